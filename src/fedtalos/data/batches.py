"""Batches: which images, in which order, for training and evaluation; pixels stay on their device.

Shapes: V holders of images side by side, B images of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fedtalos.data.images import LabelledImages
from fedtalos.data.view import Augmentation, crop, draw_crops


def batch_positions(count: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw batches of positions 0..count-1 without end: a fresh permutation per epoch, whose last batch may be small.

    >>> positions = batch_positions(10, 4, np.random.default_rng(0))
    >>> [len(batch) for batch in islice(positions, 4)]
    [4, 4, 2, 4]
    """
    while True:
        order = rng.permutation(count)
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Count the batches of one pass over ``count`` images.

    >>> steps_per_epoch(10, 4)
    3
    """
    return -(-count // batch_size)


def batch_sizes(count: int, batch_size: int, steps: int) -> tuple[int, ...]:
    """Count the images of each of the ``steps`` batches that ``training_batches`` draws from ``count`` images.

    >>> batch_sizes(10, 4, 4)
    (4, 4, 2, 4)
    """
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
    """Draw ``steps`` training batches of V holders side by side: pixels (V, B, ...) through ``view``, labels (V, B).

    ``indices`` and ``rngs`` have one entry per holder, and the holders' ``batch_sizes`` must be equal. Batches before
    number ``first`` are drawn, but not given.

    >>> batches = stacked_batches(images, [np.arange(50), np.arange(50, 100)], view, steps=4, batch_size=16,
    ...     augmentation="none", rngs=[generator(0, "batches", client) for client in range(2)])
    """
    device, height = images.pixels.device, images.pixels.shape[-2]
    draws: Iterable[Draw] = _draws(indices, rngs, steps, batch_size, augmentation, height)
    if device.type != "cpu":
        draws = sent_at_once(draws, device)
    for chosen, *crops in islice(draws, first, None):
        pixels = images.pixels[chosen.flatten()]
        x = view(crop(pixels, *crops) if crops else pixels)
        yield x.unflatten(0, chosen.shape), images.labels[chosen].to(x.device)


Draw = tuple[Tensor, ...]
"""Random draws of one batch: numbers of its images, (V, B), and where they are augmented, ``draw_crops``' (3, V B)."""


def _draws(
    indices: Sequence[np.ndarray],
    rngs: Sequence[np.random.Generator],
    steps: int,
    batch_size: int,
    augmentation: Augmentation,
    height: int,
) -> Iterator[Draw]:
    """Draw batch by batch: each holder's images, then each holder's crops."""
    orders = [batch_positions(len(own), batch_size, rng) for own, rng in zip(indices, rngs, strict=True)]
    for positions in islice(zip(*orders, strict=True), steps):
        taken = np.stack([own[at] for own, at in zip(indices, positions, strict=True)])  # (V, B)
        chosen = torch.from_numpy(taken)
        if augmentation == "none":
            yield (chosen,)
        else:
            yield chosen, draw_crops(augmentation, taken.size, height, rngs)


def sent_at_once(draws: Iterable[Draw], device: torch.device) -> Iterator[Draw]:
    """Send all draws to a device in one copy, from pinned memory for CUDA, so that the host waits for nothing."""
    drawn = list(draws)
    flat = torch.cat([tensor.flatten() for draw in drawn for tensor in draw])
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    parts = iter(flat.split([tensor.numel() for draw in drawn for tensor in draw]))
    for draw in drawn:
        yield tuple(next(parts).view_as(tensor) for tensor in draw)


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
    """Draw ``steps`` training batches of the images at ``indices``: pixels (B, ...) through ``view``, and labels (B,).

    Batches before number ``first`` are drawn, but not given.

    >>> batches = training_batches(images, np.arange(50), view, steps=4, batch_size=16, augmentation="crop",
    ...     rng=generator(0, "batches"))
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
    """Give images in stored order, without augmentation: all batches, or those numbered first, first + every, ...

    >>> sum(len(labels) for _, labels in evaluation_batches(images, view, batch_size=256)) == len(images)
    True
    """
    for start in range(first * batch_size, len(images), every * batch_size):
        x = view(images.pixels[start : start + batch_size])
        yield x, images.labels[start : start + batch_size].to(x.device)
