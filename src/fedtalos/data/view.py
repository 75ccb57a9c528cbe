"""Views: stored pixels augmented, resized and normalised for the model, on their device.

Shapes: B images of a batch, H W stored pixels, S pixels a side that the model takes, R pixels a side before the crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalos.devices import distinct_places

Augmentation = Literal["none", "crop", "crop_flip"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class View:
    """A model's input size and normalisation, applied to stored pixels.

    >>> view = View(224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> view(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([2, 3, 224, 224])
    """

    image_size: int
    """S, pixels a side."""
    mean: tuple[float, float, float]
    """Mean by channel of the pixels (in 0..1) that the model's weights were trained on."""
    std: tuple[float, float, float]
    """Standard deviation of these pixels."""
    device: torch.device | None = None
    """Device of the model; None: the pixels' own."""
    interpolation: Interpolation = "bilinear"
    """Rule by which pixels are resized where the size differs; the weights' own serves them best."""
    crop: float = 1.0
    """Share of each side, at the middle, that the model sees: timm's crop_pct."""

    @property
    def resized(self) -> int:
        """R, pixels a side before the crop: the size to store images at, so that they are resized once."""
        return int(self.image_size / self.crop)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Turn uint8 (B, 3, H, W) into normalised float32 (B, 3, S, S): resized to R, and the middle S of it."""
        images = (pixels if self.device is None else pixels.to(self.device)).float().div_(255)
        if images.shape[-2:] != (self.resized, self.resized):
            images = self._resize(images)
        if self.resized != self.image_size:
            start = round((self.resized - self.image_size) / 2)
            images = images[..., start : start + self.image_size, start : start + self.image_size].contiguous()
        return images.sub_(_by_channel(self.mean, images.device)).div_(_by_channel(self.std, images.device))

    def _resize(self, images: Tensor) -> Tensor:
        size = (self.resized, self.resized)
        if self.interpolation == "bilinear":
            # Antialiasing changes nothing otherwise, and not every device has it.
            shrinks = images.shape[-1] > self.resized
            with distinct_places():  # else CUDA takes a slow twin, for a backward pass that nobody asks for
                return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
        # With antialiasing torch takes Pillow's and timm's cubic, which overshoots as theirs does; bytes would not.
        there = images.cpu() if images.device.type == "mps" else images
        cubic = F.interpolate(there, size=size, mode="bicubic", align_corners=False, antialias=True)
        return cubic.clamp_(0, 1).to(images.device)


@cache
def _by_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Values as (3, 1, 1) on the device, sent there once: a copy makes the host wait for the device."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device).view(3, 1, 1)


def draw_crops(kind: Augmentation, batch: int, height: int, rngs: Sequence[np.random.Generator]) -> Tensor:
    """Draw for B = ``batch`` images of H = ``height`` where each crop begins and whether it is mirrored.

    Images are padded by an eighth and cropped back; ``kind`` crop_flip mirrors half of them. Returns int64 (3, B), rows
    top, left and mirrored (0 or 1). Each generator draws for its share of the batch.
    """
    pad, share = _padding(height), batch // len(rngs)
    draws = [
        (
            rng.integers(0, 2 * pad + 1, share),
            rng.integers(0, 2 * pad + 1, share),
            rng.random(share) < 0.5 if kind == "crop_flip" else np.zeros(share, dtype=bool),
        )
        for rng in rngs
    ]
    return torch.from_numpy(np.stack([np.concatenate(drawn).astype(np.int64) for drawn in zip(*draws, strict=True)]))


def crop(pixels: Tensor, crops: Tensor) -> Tensor:
    """Cut uint8 (B, 3, H, W) as ``draw_crops`` drew it, (3, B) on the pixels' device."""
    batch, _, height, width = pixels.shape
    device, pad = pixels.device, _padding(height)
    top, left, mirrored = crops.unsqueeze(2)
    across = torch.arange(width, device=device)
    rows = top + torch.arange(height, device=device)  # (B, H)
    columns = left + torch.where(mirrored > 0, across.flip(0), across)  # (B, W)
    which = torch.arange(batch, device=device)
    padded = F.pad(pixels, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # channels last: one gather per pixel
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _padding(height: int) -> int:
    """Pixels at each side: an eighth."""
    return max(1, height // 8)
