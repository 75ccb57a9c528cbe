"""The one inner loop: batches in, steps of an optimiser, summed metrics out.

Shapes: B images of a batch, C classes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.devices import Precision
from fedtalos.errors import BadUpdateError
from fedtalos.metrics import Metrics
from fedtalos.training.entries import all_finite
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.sparse_optimizer import SparseOptimizer

Batches = Iterable[tuple[Tensor, Tensor]]
"""Normalised images (B, 3, H, W) float32 with labels (B,) int64, on the model's device."""

Adjust = Callable[[Tensor], Tensor]
"""The gradient of what may move, (A,) and free to be written to -> what the optimiser is to see."""

CHECK_EVERY = 16


def train(
    moving: MaskedParameters,
    batches: Batches,
    optimizer: Optimizer,
    *,
    learning_rate: Callable[[int], float],
    clip_norm: float | None = None,
    precision: Precision = "fp32",
    forward: Callable[[Tensor], Tensor] | None = None,
    adjust: Adjust | None = None,
    allowed: Tensor | None = None,
) -> Metrics:
    """Step ``optimizer`` once per batch on the mean cross-entropy; ``learning_rate`` maps a step's number to its rate.

    ``forward`` maps a batch's first tensor to logits (B, C), where that is not the whole model. ``adjust`` changes
    gradients before they are clipped. ``allowed`` (C, C) says which logits count for a label (None: all).

    Raises BadUpdateError where a loss, a clipped gradient or the final values are not finite: on a CPU before that
    batch's step, elsewhere within CHECK_EVERY steps, since reading a value waits for all that the device has yet to do.
    Raises ValueError for an optimiser of other entries than ``moving`` has.
    """
    check_optimizer(optimizer, moving)
    moving.freeze()
    moving.model.train()
    total, unread, step = Metrics(), list[Step](), None
    for number, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        loss, correct = moving.micro_batch.backward(
            forward or moving.model, optimizer, images, labels, precision, allowed
        )
        if adjust is not None:
            gradients = moving.gradients()
            moving.entries.scatter(adjust(moving.entries.gather(gradients)), gradients)
        norm = loss if clip_norm is None else moving.clip_gradients(clip_norm)
        step = Step(number, learning_rate(number), len(labels), loss, norm, correct)
        unread.append(step)
        if images.device.type == "cpu" or len(unread) == CHECK_EVERY:
            total += read(unread)
            unread.clear()
        optimizer.step()
    total += read(unread)
    if step is not None:
        check_values(list(moving.parameters.values()), step)
    return total


def check_optimizer(optimizer: Optimizer, moving: MaskedParameters) -> None:
    """Refuse an optimiser that would move what is frozen, or leave out what moves; raises ValueError."""
    steps = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if {id(parameter) for parameter in steps} != {id(parameter) for parameter in moving.parameters.values()}:
        raise ValueError("optimizer: steps other tensors than may move; make it with make_optimizer")
    if isinstance(optimizer, SparseOptimizer):
        if not optimizer.steps_only(moving.entries.indices[name] for name in moving.parameters):
            raise ValueError("optimizer: steps other entries than may move; make it with make_optimizer")
    elif not moving.entries.whole:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} steps whole tensors, and a mask freezes entries of them; "
            "take SparseSGD or SparseAdamW, or make it with make_optimizer"
        )


@dataclass(frozen=True)
class Step:
    """Figures that a step leaves on the device: mean loss, norm of the gradient and correct answers.

    Each of shape (), or (V,) of V clients that train together; ``examples`` are those of one.
    """

    number: int
    learning_rate: float
    examples: int
    loss: Tensor
    norm: Tensor
    correct: Tensor


def read(steps: Sequence[Step]) -> Metrics:
    """Sum the steps' metrics, fetched from the device at once. Raises BadUpdateError where one is not finite."""
    return add_up(steps, fetch(steps)) if steps else Metrics()


def fetch(steps: Sequence[Step]) -> Tensor:
    """Loss, norm and correct answers of J steps, (J, 3) or (J, 3, V), on the CPU: waits for the device."""
    return torch.stack([torch.stack([step.loss, step.norm, step.correct.float()]) for step in steps]).cpu()


def add_up(steps: Sequence[Step], figures: Tensor) -> Metrics:
    """Sum the steps' metrics from their figures (J, 3). Raises BadUpdateError where one is not finite."""
    total = Metrics()
    for step, (loss, norm, correct) in zip(steps, figures.tolist(), strict=True):
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise BadUpdateError(
                    f"the {what} became {value} at local step {step.number + 1}, learning rate {step.learning_rate:g}; "
                    "nothing of that step was kept; try a lower learning_rate"
                )
        total += Metrics(loss * step.examples, int(correct), step.examples)
    return total


def check_values(values: list[Tensor], last: Step) -> None:
    """Raise BadUpdateError where the values that the ``last`` step left are not finite: no loss was taken of them."""
    if not all_finite(values):
        raise BadUpdateError(
            f"the update became not finite at local step {last.number + 1}, learning rate {last.learning_rate:g}; "
            "nothing of it was kept; try a lower learning_rate"
        )
