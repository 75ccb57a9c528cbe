"""Batches drawn, augmented, resized and normalised on the device, as functions of tensors.

Shapes: N stored images, B images of a batch, H W stored pixels, S pixels a side that the model takes.
"""

from collections.abc import Callable, Iterator, Sequence
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


def augment(pixels: Tensor, kind: Augmentation, *rngs: np.random.Generator) -> Tensor:
    """Pad by an eighth and crop back at random, then flip half of the images: uint8 (B, 3, H, W) -> the same shape.

    Each generator draws for its share of the batch; the shares are equal.
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


def batch_positions(count: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless epochs over 0..count-1: a fresh permutation each, its last batch as small as it comes out."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Batches in one pass over ``count`` images."""
    return -(-count // batch_size)


def batch_sizes(count: int, batch_size: int, steps: int) -> tuple[int, ...]:
    """Images in each of the ``steps`` batches that ``training_batches`` draws from ``count``."""
    last = steps_per_epoch(count, batch_size) - 1
    return tuple(count - last * batch_size if step % (last + 1) == last else batch_size for step in range(steps))


def stacked_batches(
    images: LabelledImages,
    indices: Sequence[np.ndarray],
    view: Callable[[Tensor], Tensor],
    *,
    steps: int,
    batch_size: int,
    augmentation: Augmentation,
    rngs: Sequence[np.random.Generator],
    first: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of V holders side by side: (V, B, ...) as ``view`` gives them, and labels (V, B).

    ``indices`` and ``rngs`` are one for each; their ``batch_sizes`` are to be equal. Batches before number ``first``
    are drawn, but not given.
    """
    orders = [batch_positions(len(own), batch_size, rng) for own, rng in zip(indices, rngs, strict=True)]
    for step, positions in enumerate(islice(zip(*orders, strict=True), steps)):
        taken = np.stack([own[at] for own, at in zip(indices, positions, strict=True)])  # (V, B)
        chosen = torch.from_numpy(taken).to(images.pixels.device)
        pixels = augment(images.pixels[chosen.flatten()], augmentation, *rngs)
        if step < first:
            continue
        x = view(pixels)
        yield x.unflatten(0, chosen.shape), images.labels[chosen].to(x.device)


def training_batches(
    images: LabelledImages,
    indices: np.ndarray,
    view: Callable[[Tensor], Tensor],
    *,
    steps: int,
    batch_size: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
    first: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches of the images at ``indices``, drawn from ``rng``: as ``view`` gives them, and labels (B,).

    Those before number ``first`` are drawn, but not given.
    """
    stacked = stacked_batches(
        images, [indices], view, steps=steps, batch_size=batch_size, augmentation=augmentation, rngs=[rng], first=first
    )
    for x, labels in stacked:
        yield x.squeeze(0), labels.squeeze(0)


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
