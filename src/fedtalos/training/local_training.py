"""Local training: what a client does with its own images between two messages of the server.

Letters: J local steps, B images of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.data.batches import steps_per_epoch, training_batches
from fedtalos.data.class_groups import Groups, group_of
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.data.view import Augmentation
from fedtalos.devices import Precision
from fedtalos.errors import InputError, check_word
from fedtalos.metrics import Metrics
from fedtalos.training.feature_cache import plain_source
from fedtalos.training.loop import Adjust, Batches, train
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.schedule import Schedule
from fedtalos.training.sparse_optimizer import OptimizerName, make_optimizer

Watch = Callable[[Batches, float], Batches]
"""Passes batches on; each is that share of a round or an epoch."""


def unwatched(batches: Batches, _share: float) -> Batches:
    """Pass batches on."""
    return batches


@dataclass(frozen=True)
class LocalTraining:
    """Optimiser steps on one holder's images: how many, on which batches, by which rule.

    ``steps`` is J; ``epochs``, passes over the holder's images, replaces it where given. ``learning_rate`` is a number,
    or a Schedule over rounds or epochs. ``weight_decay`` is decoupled for adamw and L2 for sgd; ``clip_norm`` bounds
    the 2-norm of the gradient of what moves. A holder begins with a fresh optimiser: it keeps no momentum. ``groups``
    are groups of classes, such as tasks: of an image, the logits of its label's group alone count (of none: all).

    Raises InputError for unknown words and values outside their limits.

    >>> local = LocalTraining(steps=4, learning_rate=1e-3)
    >>> metrics = local.run(moving, images, np.arange(len(images)), np.random.default_rng(0))
    """

    steps: int = 4
    epochs: int | None = None
    batch_size: int = 64
    optimizer: OptimizerName = "adamw"
    learning_rate: float | Schedule = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    augmentation: Augmentation = "none"
    precision: Precision = "fp32"
    groups: Groups = ()

    def __post_init__(self) -> None:
        check_word("optimizer", self.optimizer, OptimizerName)
        check_word("augmentation", self.augmentation, Augmentation)
        check_word("precision", self.precision, Precision)
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value}: expected at least 1")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value < float("inf"):
                raise InputError(f"{name} {value}: expected a number above 0")

    def steps_for(self, examples: int) -> int:
        """J of a holder of so many images: as given, or as many as ``epochs`` passes take."""
        return self.steps if self.epochs is None else self.epochs * steps_per_epoch(examples, self.batch_size)

    def rate(self, done: float, share: float = 1.0) -> float:
        """The learning rate after ``done`` rounds or epochs, to be held for a ``share`` of one."""
        return self.learning_rate(done, share) if isinstance(self.learning_rate, Schedule) else self.learning_rate

    def optimizer_for(self, moving: MaskedParameters) -> Optimizer:
        """A fresh optimiser of what moves."""
        return make_optimizer(
            moving.parameters,
            moving.entries,
            rule=self.optimizer,
            learning_rate=self.rate(0),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def allowed(self, moving: MaskedParameters) -> Tensor | None:
        """Logits that count for a label, (C, C) bool; None: all of them."""
        if not self.groups:
            return None
        group = torch.from_numpy(group_of(self.groups, moving.model.architecture.num_classes)).to(moving.device)
        return (group.unsqueeze(1) == group) | (group.unsqueeze(1) < 0)

    def but(self, **changes: object) -> Self:
        """The same training with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def run(
        self,
        moving: MaskedParameters,
        images: LabelledImages,
        ids: Ids,
        rng: np.random.Generator,
        adjust: Adjust | None = None,
        *,
        learning_rate: float | Callable[[int], float] | None = None,
        optimizer: Optimizer | None = None,
        first: int = 0,
        watch: Watch = unwatched,
        share: float = 1.0,
    ) -> Metrics:
        """Train on the ``images`` at ``ids``, in an order drawn from ``rng``; returns summed metrics of the steps.

        ``adjust`` changes gradients on their way to the optimiser. ``learning_rate`` is a number, or maps a step's
        number to its rate (default: the rate at the beginning). ``optimizer`` is one to go on with, ``first`` the step
        to go on at. ``watch`` sees the batches, and which part of a round each is; this training is a ``share`` of it.

        Raises BadUpdateError where training diverges.
        """
        rate = self.rate(0) if learning_rate is None else learning_rate
        steps = self.steps_for(len(ids))
        source = plain_source(moving.model, images)
        if self.augmentation == "none":
            source = moving.source(images, [ids])
        batches = training_batches(
            source.images,
            ids,
            source.view,
            steps=steps,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            rng=rng,
            first=first,
        )
        return train(
            moving,
            watch(batches, share / steps),
            optimizer or self.optimizer_for(moving),
            learning_rate=rate if callable(rate) else lambda _step: rate,
            clip_norm=self.clip_norm,
            precision=self.precision,
            forward=source.forward,
            adjust=adjust,
            allowed=self.allowed(moving),
        )
