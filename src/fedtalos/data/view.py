"""Views: stored pixels augmented, resized and normalised for the model, on their device.

Shapes: B images of a batch, H W stored pixels, S pixels a side that the model takes, R pixels a side before the crop.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return images.sub_(mean).div_(std)

    def _resize(self, images: Tensor) -> Tensor:
        size = (self.resized, self.resized)
        if self.interpolation == "bilinear":
            # Antialiasing changes nothing otherwise, and not every device has it.
            shrinks = images.shape[-1] > self.resized
            return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
        # With antialiasing torch takes Pillow's and timm's cubic, which overshoots as theirs does; bytes would not.
        there = images.cpu() if images.device.type == "mps" else images
        cubic = F.interpolate(there, size=size, mode="bicubic", align_corners=False, antialias=True)
        return cubic.clamp_(0, 1).to(images.device)


def augment(pixels: Tensor, kind: Augmentation, *rngs: np.random.Generator) -> Tensor:
    """Pad uint8 (B, 3, H, W) by an eighth and crop back at random; crop_flip mirrors half of the images too.

    Each generator draws for its share of the batch; the shares are equal.

    >>> augment(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "crop_flip", np.random.default_rng(0)).shape
    torch.Size([4, 3, 32, 32])
    """
    if kind == "none":
        return pixels
    batch, _, height, width = pixels.shape
    pad = max(1, height // 8)
    share = batch // len(rngs)
    draws = [
        (
            rng.integers(0, 2 * pad + 1, share),
            rng.integers(0, 2 * pad + 1, share),
            rng.random(share) < 0.5 if kind == "crop_flip" else np.zeros(share, dtype=bool),
        )
        for rng in rngs
    ]
    top, left, flip = (torch.from_numpy(np.concatenate(drawn)) for drawn in zip(*draws, strict=True))
    rows = top[:, None] + torch.arange(height)  # (B, H)
    columns = left[:, None] + torch.arange(width)  # (B, W)
    columns[flip] = columns[flip].flip(1)
    which, rows, columns = (t.to(pixels.device) for t in (torch.arange(batch), rows, columns))
    padded = F.pad(pixels, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # channels last: one gather per pixel
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
