"""Batches made ready one ahead, on a CUDA stream beside the one that trains."""

import torch
from torch import Tensor

from fedtalos.training.engine.capture import stream_beside
from fedtalos.training.loop import Batches


def one_ahead(batches: Batches, device: torch.device) -> Batches:
    """Gather, augment and resize each batch while the step on the one before it runs; off CUDA, pass batches on.

    A batch is good until the next one is asked for: two places in memory serve them all in turn.

    >>> stack.train(one_ahead(batches, torch.device("cuda")), learning_rate=1e-3)
    """
    if device.type != "cuda":
        yield from batches
        return
    side, main = stream_beside(device), torch.cuda.current_stream(device)
    places: tuple[Place, Place] = ({}, {})
    coming = iter(batches)

    def prepared(place: Place) -> tuple[Tensor, Tensor] | None:
        side.wait_stream(main)  # until the step on what is in the place now is done
        with torch.cuda.stream(side):
            batch = next(coming, None)
            return None if batch is None else put(batch, place)

    ready, number = prepared(places[0]), 0
    while ready is not None:
        main.wait_stream(side)
        number += 1
        following = prepared(places[number % 2])
        yield ready
        ready = following


Place = dict[tuple[torch.Size, torch.Size], tuple[Tensor, Tensor]]
"""Memory for a batch, by its shapes."""


def put(batch: tuple[Tensor, Tensor], place: Place) -> tuple[Tensor, Tensor]:
    """Copy a batch into its place."""
    images, labels = batch
    kept = place.setdefault((images.shape, labels.shape), (images, labels))
    for there, new in zip(kept, batch, strict=True):
        if there is not new:
            there.copy_(new)
    return kept
