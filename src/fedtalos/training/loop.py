"""The one inner loop: batches in, steps of an optimiser, summed metrics out.

Shapes: B images of a batch, C classes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fedtalos.metrics import Metrics
from fedtalos.models.row_sparse_linear import Linear, rows_with_true
from fedtalos.training.masked_parameters import Entries, all_finite, clip_gradients, gradients_of
from fedtalos.training.micro_batches import MicroBatch
from fedtalos.training.sparse_optimizer import SparseAdamW, SparseSGD

Batches = Iterable[tuple[Tensor, Tensor]]
"""Normalised images (B, 3, H, W) float32 with labels (B,) int64, on the model's device."""

Precision = Literal["fp32", "bf16"]

Adjust = Callable[[Tensor], Tensor]
"""The gradient of the entries that may move, (A,) and free to be written to -> what the optimiser is to see."""

CHECK_EVERY = 16


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to try."""


class BadUpdateError(TrainingError):
    """What one training came to must not be used, since it is not finite; others' may be."""


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Mixed precision for forward passes: bf16 arithmetic, float32 weights, gradients and sums."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def freeze_all_but(model: nn.Module, entries: Entries) -> None:
    """Give gradients only to tensors, and of Linear weights to rows, with an entry that may move: the rest is free."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in entries.masks)
        parameter.grad = None
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            mask = entries.masks.get(f"{name}.weight")
            module.active_rows = None if mask is None else rows_with_true(mask)


def make_optimizer(
    model: nn.Module | Mapping[str, nn.Parameter],
    entries: Entries,
    *,
    rule: Literal["sgd", "adamw"],
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """torch.optim's optimiser where whole tensors move, its sparse twin where a mask leaves some entries frozen.

    ``model``, or its parameters by name.
    """
    parameters = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
    moving = [parameters[name] for name in entries.masks]
    masks = list(entries.masks.values())
    if rule == "sgd":
        if entries.whole:
            return torch.optim.SGD(moving, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
        return SparseSGD(moving, masks, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if entries.whole:
        fused = entries.device.type == "cuda"  # one kernel instead of a dozen; on a CPU the update is 1 % of a step
        return torch.optim.AdamW(moving, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    return SparseAdamW(moving, masks, lr=learning_rate, weight_decay=weight_decay)


def learning_rate_schedule(
    kind: Literal["constant", "cosine", "step"],
    peak: float,
    total: int,
    *,
    warmup: int,
    step_every: int,
    step_gamma: float,
) -> Callable[[float], float]:
    """Learning rate as a function of epochs or rounds done (0 to ``total``): linear warm-up, then the schedule."""

    def rate(done: float) -> float:
        if done < warmup:
            return peak * (done + 1) / (warmup + 1)
        if kind == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))
        if kind == "step":
            return peak * float(step_gamma ** (done // step_every))
        return peak

    return rate


def train(
    model: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    entries: Entries,
    *,
    learning_rate: Callable[[int], float],
    clip_norm: float | None,
    precision: Precision = "fp32",
    forward: Callable[[Tensor], Tensor] | None = None,
    adjust: Adjust | None = None,
    micro_batch: MicroBatch | None = None,
) -> Metrics:
    """Step ``optimizer`` once per batch on the mean cross-entropy; ``learning_rate`` maps the batch's number to a rate.

    ``forward`` maps a batch's first tensor to logits (B, C), where that is not all of the model's own.
    ``adjust`` is asked before gradients are clipped.
    ``micro_batch`` remembers what fitted into memory from one call to the next.
    Raises BadUpdateError where a loss, or a clipped gradient, is not finite: on a CPU before that batch's step,
    elsewhere within CHECK_EVERY steps, since to read a value waits for all that the device has yet to do. And where
    the values are not finite in the end.
    """
    model.train()
    parameters = dict(model.named_parameters())
    micro_batch = micro_batch or MicroBatch()
    backward = partial(_backward, forward or model, precision=precision)
    total, unread, step = Metrics(), list[Step](), None
    for number, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        loss, correct = micro_batch.backward(backward, optimizer, images, labels)
        if adjust is not None:
            gradients = gradients_of(parameters, entries)
            entries.scatter(adjust(entries.gather(gradients)), gradients)
        norm = loss if clip_norm is None else clip_gradients(parameters, entries, clip_norm)
        step = Step(number, learning_rate(number), len(labels), loss, norm, correct)
        unread.append(step)
        if images.device.type == "cpu" or len(unread) == CHECK_EVERY:
            total += read(unread)
            unread.clear()
        optimizer.step()
    total += read(unread)
    if step is not None:
        check_values([parameters[name] for name in entries.masks], step)
    return total


def _backward(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, share: float, *, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Add the gradient of ``share`` times the mean loss; returns that, and the number of correct answers, both ()."""
    with autocast(images.device, precision):
        logits = forward(images)
    loss = F.cross_entropy(logits.float(), labels) * share
    loss.backward()
    return loss.detach(), correct_answers(logits, labels)


@dataclass(frozen=True)
class Step:
    """What a step leaves on the device: mean loss, norm of the gradient and correct answers.

    Each of shape (), or (V,) of V clients that train together; ``examples`` are those of one.
    """

    number: int
    learning_rate: float
    examples: int
    loss: Tensor
    norm: Tensor
    correct: Tensor


def correct_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of (B, C) logits are largest at their label, ()."""
    return (logits.argmax(1) == labels).sum()


def read(steps: Sequence[Step]) -> Metrics:
    """The steps' metrics, fetched from the device at once. Raises BadUpdateError where one is not finite."""
    return add_up(steps, fetch(steps)) if steps else Metrics()


def fetch(steps: Sequence[Step]) -> Tensor:
    """Loss, norm and correct answers of J steps, (J, 3) or (J, 3, V), on the CPU: waits for the device."""
    return torch.stack([torch.stack([step.loss, step.norm, step.correct.float()]) for step in steps]).cpu()


def add_up(steps: Sequence[Step], figures: Tensor) -> Metrics:
    """The steps' metrics from their figures (J, 3). Raises BadUpdateError where one is not finite."""
    total = Metrics()
    for step, (loss, norm, correct) in zip(steps, figures.tolist(), strict=True):
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise BadUpdateError(
                    f"the {what} became {value} at local step {step.number + 1}, learning rate {step.learning_rate:g}; "
                    "nothing of that step was kept; try a lower --learning_rate"
                )
        total += Metrics(loss * step.examples, int(correct), step.examples)
    return total


def check_values(values: list[Tensor], last: Step) -> None:
    """BadUpdateError where the values that the ``last`` step left are not finite: no loss was taken of them."""
    if not all_finite(values):
        raise BadUpdateError(
            f"the update became not finite at local step {last.number + 1}, learning rate {last.learning_rate:g}; "
            "nothing of it was kept; try a lower --learning_rate"
        )
