"""Batches drawn, augmented, resized and normalised on the device, as functions of tensors.

Shapes: N stored images, B images of a batch, H W stored pixels, S pixels a side that the model takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalos.data.images import LabelledImages

Augmentation = Literal["none", "crop", "crop_flip"]


@dataclass(frozen=True)
class View:
    """How stored images become what the model takes: side S, and the mean and deviation of its weights."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised float32 (B, 3, S, S), bilinear where the size differs."""
        images = pixels.float().div_(255)
        if images.shape[-2:] != (self.image_size, self.image_size):
            shrinks = images.shape[-1] > self.image_size  # antialiasing does nothing else, and not every device has it
            images = F.interpolate(
                images, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False, antialias=shrinks
            )
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return images.sub_(mean).div_(std)


def augment(pixels: Tensor, kind: Augmentation, rng: np.random.Generator) -> Tensor:
    """Pad by an eighth and crop back at random, then flip half of the images: uint8 (B, 3, H, W) -> the same shape."""
    if kind == "none":
        return pixels
    batch, _, height, width = pixels.shape
    pad = max(1, height // 8)
    top, left = (torch.from_numpy(rng.integers(0, 2 * pad + 1, batch)) for _ in range(2))
    rows = top[:, None] + torch.arange(height)  # (B, H)
    columns = left[:, None] + torch.arange(width)  # (B, W)
    if kind == "crop_flip":
        flip = torch.from_numpy(rng.random(batch) < 0.5)
        columns[flip] = columns[flip].flip(1)
    which, rows, columns = (t.to(pixels.device) for t in (torch.arange(batch), rows, columns))
    padded = F.pad(pixels, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # channels last: one gather per pixel
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batch_positions(count: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless epochs over 0..count-1: a fresh permutation each, its last batch as small as it comes out."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Batches in one pass over ``count`` images."""
    return -(-count // batch_size)


def training_batches(
    images: LabelledImages,
    indices: np.ndarray,
    view: Callable[[Tensor], Tensor],
    *,
    steps: int,
    batch_size: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches of the images at ``indices``, drawn from ``rng``: as ``view`` gives them, and labels (B,)."""
    for positions in islice(batch_positions(len(indices), batch_size, rng), steps):
        chosen = torch.from_numpy(indices[positions]).to(images.pixels.device)
        x = view(augment(images.pixels[chosen], augmentation, rng))
        yield x, images.labels[chosen].to(x.device)


def evaluation_batches(
    images: LabelledImages,
    view: Callable[[Tensor], Tensor],
    batch_size: int,
    *,
    first: int = 0,
    every: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in stored order, without augmentation: all batches, or those numbered first, first + every, ..."""
    for start in range(first * batch_size, len(images), every * batch_size):
        x = view(images.pixels[start : start + batch_size])
        yield x, images.labels[start : start + batch_size].to(x.device)
