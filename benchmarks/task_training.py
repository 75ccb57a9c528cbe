"""Training of the study of tasks: each task by itself, or all images together, by steps as they stand or captured.

Shapes: T tasks, A entries that move.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from task_rows import Clock

import fedtalos as ft
from fedtalos.data.class_groups import Groups
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.devices import Precision
from fedtalos.errors import BadUpdateError
from fedtalos.models.backbone import Backbone
from fedtalos.randomness import generator
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.editing.vector_facts import VectorFacts
from fedtalos.training.engine.batches import batches_of
from fedtalos.training.engine.capture import Compile
from fedtalos.training.engine.one_holder import OneHolder
from fedtalos.training.engine.step import Stack
from fedtalos.training.entries import Mask
from fedtalos.training.masked_parameters import MaskedParameters


class Settings(Protocol):
    """What of a study says how to train."""

    epochs: int
    batch_size: int
    precision: Precision
    compile: Compile
    local_classes: str


class Training:
    """Trains from a start that ``begin`` gives the model; ``ids`` are the images of each of T tasks.

    Where steps are captured, tasks of one mask and one size train side by side in a stack.
    """

    def __init__(
        self,
        settings: Settings,
        images: LabelledImages,
        model: Backbone,
        seed: int,
        groups: Groups,
        ids: Sequence[Ids],
        clock: Clock,
        begin: Callable[[], VectorFacts],
    ) -> None:
        self.settings, self.images, self.model, self.seed = settings, images, model, seed
        self.groups, self.ids, self.clock, self.begin = groups, ids, clock, begin
        self._captured: dict[tuple[int, bool], tuple[OneHolder, Mask]] = {}
        self._stack: Stack | None = None

    def forget(self) -> None:
        """Let go of what was captured: other masks come."""
        self._captured.clear()
        self._stack = None

    def of_all(self, masks: Sequence[Mask], rate: float) -> list[TaskVector]:
        """The vectors of all tasks, each under its mask."""
        groups = self.groups if self.settings.local_classes == "task" else ()
        same = all(mask is masks[0] for mask in masks) and len({len(ids) for ids in self.ids}) == 1
        if same and self.settings.compile != "off":
            return self._side_by_side(masks[0], rate, groups)
        return [
            self._alone(mask, ids, rate, task, groups)
            for task, (mask, ids) in enumerate(zip(masks, self.ids, strict=True))
        ]

    def together(self, mask: Mask, ids: Ids, rate: float, number: int) -> TaskVector:
        """The vector of one training on all these images, among all classes; ``number`` names its draws."""
        return self._alone(mask, ids, rate, number, ())

    def _side_by_side(self, mask: Mask, rate: float, groups: Groups) -> list[TaskVector]:
        local, facts = self._local(rate, groups), self.begin()
        moving, count = MaskedParameters(self.model, mask), len(self.ids[0])
        if self._stack is None:
            self._stack = Stack(moving, local, len(self.ids), compile=self.settings.compile)
        self._stack.load(moving.copy())
        rngs = [generator(self.seed, "batches", task) for task in range(len(self.ids))]
        batches = batches_of(moving, local, self.images, self.ids, rngs, steps=local.steps_for(count))
        with self.clock.part("training", self.settings.epochs * count * len(self.ids)):
            self._stack.train(batches, self._schedule(rate, local.steps_for(count)))
            if not bool(self._stack.finite().all()):
                raise BadUpdateError(f"training became not finite at rate {rate:g}")
            moved = self._stack.vector() - moving.vector()  # (T, A)
        return [TaskVector(moving.entries.masks, row.clone(), facts) for row in moved]

    def _alone(self, mask: Mask, ids: Ids, rate: float, number: int, groups: Groups) -> TaskVector:
        local, facts = self._local(rate, groups), self.begin()
        moving = MaskedParameters(self.model, mask)
        start, rng = moving.vector(), generator(self.seed, "batches", number)
        at = self._schedule(rate, local.steps_for(len(ids)))
        with self.clock.part("training", self.settings.epochs * len(ids)):
            if self.settings.compile == "off":
                local.run(moving, self.images, ids, rng, learning_rate=at)
            else:
                holder = self._holder(moving, mask, local)
                holder.run(self.images, ids, rng, optimizer=local.optimizer_for(moving), learning_rate=at)
        return TaskVector(moving.entries.masks, moving.vector() - start, facts)

    def _holder(self, moving: MaskedParameters, mask: Mask, local: ft.LocalTraining) -> OneHolder:
        """What trains a mask's entries by captured steps, once for all that share the mask."""
        key = id(mask), bool(local.groups)
        if key not in self._captured:
            self._captured[key] = OneHolder(moving, local, compile=self.settings.compile), mask
        return self._captured[key][0]

    def _local(self, rate: float, groups: Groups) -> ft.LocalTraining:
        return ft.LocalTraining(
            epochs=self.settings.epochs,
            batch_size=self.settings.batch_size,
            learning_rate=rate,
            weight_decay=0.0,
            augmentation="crop_flip",
            precision=self.settings.precision,
            groups=groups,
        )

    @staticmethod
    def _schedule(rate: float, steps: int) -> Callable[[int], float]:
        """A cosine from the rate to 0 over so many steps."""
        return lambda step: rate * 0.5 * (1 + math.cos(math.pi * step / steps))
