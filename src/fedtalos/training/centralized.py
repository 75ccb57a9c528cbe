"""Centralised training: the baseline, one holder of all images, epoch by epoch."""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.data.batches import steps_per_epoch
from fedtalos.data.images import LabelledImages
from fedtalos.errors import BadUpdateError
from fedtalos.metrics import Metrics
from fedtalos.models.backbone import Backbone
from fedtalos.randomness import generator
from fedtalos.training.engine.capture import Compile
from fedtalos.training.engine.one_holder import OneHolder
from fedtalos.training.local_training import LocalTraining, Watch, unwatched
from fedtalos.training.masked_parameters import MaskedParameters


def train_centralized(
    model: Backbone | MaskedParameters,
    images: LabelledImages,
    mask: Mapping[str, Tensor] | None = None,
    *,
    local: LocalTraining,
    epochs: int,
    seed: int = 0,
    optimizer: Optimizer | None = None,
    done: int = 0,
    so_far: Metrics | None = None,
    watch: Watch = unwatched,
    compile: Compile = "off",
) -> Iterator[tuple[int, Metrics]]:
    """Train on all images in one place: yield the number and training metrics of epochs done+1..epochs.

    The learning rate follows ``local``'s schedule from step to step. ``optimizer`` and ``so_far``, the metrics of an
    epoch that was stopped within, are those of a run to go on with. Where ``watch`` ends an epoch early, its metrics
    are yielded as far as they came, and the generator ends. With ``compile`` graph or on, steps are CUDA graphs where
    that is possible (engine/one_holder.py), and equal the loop's up to rounding.

    Raises BadUpdateError where training diverges, InputError for models of other libraries with ``compile``.

    >>> for epoch, metrics in train_centralized(model, data.train, local=LocalTraining(), epochs=3):
    ...     print(epoch, metrics.accuracy)
    """
    moving = MaskedParameters.of(model, mask)
    optimizer = optimizer or local.optimizer_for(moving)
    everything = np.arange(len(images))
    local, steps = local.but(epochs=1), steps_per_epoch(len(images), local.batch_size)
    engine = None if compile == "off" else OneHolder(moving, local, compile=compile)
    metrics = so_far or Metrics()
    for number in range(done + 1, epochs + 1):
        first = metrics.examples // local.batch_size

        def rate(step: int, done: int = number - 1, first: int = first) -> float:
            return local.rate(done + (first + step) / steps, 1 / steps)

        try:
            rng = generator(seed, "batches", number, 0)
            run = partial(local.run, moving) if engine is None else engine.run
            metrics += run(images, everything, rng, learning_rate=rate, optimizer=optimizer, first=first, watch=watch)
        except BadUpdateError as error:
            raise BadUpdateError(f"epoch {number}: {error}") from error
        moving.note_training()
        yield number, metrics
        if metrics.examples < len(images):
            return
        metrics = Metrics()
