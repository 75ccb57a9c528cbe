"""The one inner loop: batches in, steps of an optimiser, summed metrics out.

Shapes: B images of a batch, C classes.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fedtalos.metrics import Metrics
from fedtalos.models.linear import Linear, rows_with_true
from fedtalos.parameters import Entries, clip_gradients
from fedtalos.training.sparse_optimizer import SparseAdamW, SparseSGD

Batches = Iterable[tuple[Tensor, Tensor]]
"""Normalised images (B, 3, H, W) float32 with labels (B,) int64, on the model's device."""

Precision = Literal["fp32", "bf16"]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to try."""


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
    model: nn.Module,
    entries: Entries,
    *,
    rule: Literal["sgd", "adamw"],
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """torch.optim's optimiser where whole tensors move, its sparse twin where a mask leaves some entries frozen."""
    parameters = dict(model.named_parameters())
    moving = [parameters[name] for name in entries.masks]
    masks = list(entries.masks.values())
    if rule == "sgd":
        if entries.whole:
            return torch.optim.SGD(moving, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
        return SparseSGD(moving, masks, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if entries.whole:
        return torch.optim.AdamW(moving, lr=learning_rate, weight_decay=weight_decay)
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
) -> Metrics:
    """Step ``optimizer`` once per batch on the mean cross-entropy; ``learning_rate`` maps the batch's number to a rate.

    Raises TrainingError before the step of a batch whose loss, or clipped gradient, is not finite.
    """
    model.train()
    parameters = dict(model.named_parameters())
    total = Metrics()
    for number, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        with autocast(images.device, precision):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        if not math.isfinite(loss_value := loss.item()):
            raise TrainingError(
                f"the loss became {loss_value} at local step {number + 1}, learning rate {learning_rate(number):g}; "
                "nothing of that step was kept; try a lower --learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_norm is not None:
            norm = clip_gradients(parameters, entries, clip_norm)
            if not math.isfinite(norm):
                raise TrainingError(
                    f"the gradient became {norm} at local step {number + 1}, learning rate "
                    f"{learning_rate(number):g}; nothing of that step was kept; try a lower --learning_rate"
                )
        optimizer.step()
        correct = int((logits.argmax(1) == labels).sum())
        total += Metrics(loss_value * len(labels), correct, len(labels))
    return total
