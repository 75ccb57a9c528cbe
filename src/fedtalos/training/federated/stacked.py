"""Clients of a round trained together, for devices that one client's batch does not fill.

The tensors that move are stacked, a copy per client; torch.func's vmap takes the gradients of all clients at once, and
one optimiser steps the stacks, since its rules work entry by entry. Frozen tensors are shared.

Shapes: V clients that train together, B images of a batch, A chosen entries.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.optim import Optimizer

from fedtalos.models.vision_transformer import without_fused_attention
from fedtalos.training.federated.fedavg import Outcome, TrainClients
from fedtalos.training.loop import (
    BadUpdateError,
    Batches,
    Precision,
    Step,
    add_up,
    autocast,
    check_values,
    correct_answers,
    fetch,
)
from fedtalos.training.masked_parameters import Entries, Values, named_tensors

OptimizerOf = Callable[[Mapping[str, nn.Parameter], Entries], Optimizer]
"""An optimiser of the named parameters' entries; ``make_optimizer`` with all else given."""


class Stack:
    """V copies of the tensors that move, (V, *shape) each, and the one optimiser of them all."""

    def __init__(self, model: nn.Module, entries: Entries, size: int, optimizer_of: OptimizerOf) -> None:
        tensors = named_tensors(model)
        self.model = model
        self.parameters = {name: nn.Parameter(torch.stack([tensors[name]] * size)) for name in entries.masks}
        self.entries = Entries({name: mask.expand(size, *mask.shape) for name, mask in entries.masks.items()})
        self.optimizer = optimizer_of(self.parameters, self.entries)
        self.clients = [
            entries.moving_rows({name: stack[client] for name, stack in self.parameters.items()})
            for client in range(size)
        ]
        """Each client's values, views in the parts of ``Entries.moving_rows``."""

    def load(self, theta: Values) -> None:
        """Every client starts from theta, and with an optimiser that has seen nothing."""
        for values in self.clients:
            torch._foreach_copy_(values, theta.parts)
        self.optimizer.state.clear()

    def train(
        self, batches: Batches, *, learning_rate: float, clip_norm: float | None, precision: Precision
    ) -> list[Step]:
        """A step of all clients per batch, (V, B, 3, H, W) and (V, B); nothing is read from the device."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with without_fused_attention(self.model):
            return [
                self._step(number, images, labels, learning_rate, clip_norm, precision)
                for number, (images, labels) in enumerate(batches)
            ]

    def _step(
        self,
        number: int,
        images: Tensor,
        labels: Tensor,
        learning_rate: float,
        clip_norm: float | None,
        precision: Precision,
    ) -> Step:
        def loss_and_correct(moving: dict[str, Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with autocast(images.device, precision):
                logits = functional_call(self.model, moving, (images,))
            return F.cross_entropy(logits.float(), labels), correct_answers(logits, labels)

        values = {name: stack.detach() for name, stack in self.parameters.items()}
        gradients, (losses, correct) = vmap(grad_and_value(loss_and_correct, has_aux=True))(values, images, labels)
        norms = losses if clip_norm is None else clip_each(gradients, self.entries, clip_norm)
        for name, stack in self.parameters.items():
            stack.grad = gradients[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(number, learning_rate, labels.shape[1], losses, norms, correct)


def clip_each(gradients: Mapping[str, Tensor], entries: Entries, max_norm: float) -> Tensor:
    """``clip_gradients`` of every client by itself, on stacks (V, *shape), in place; returns the norms found, (V,)."""
    size = len(next(iter(gradients.values())))
    norms: Tensor = torch.stack([part.view(size, -1).norm(dim=1) for part in entries.parts(gradients)]).norm(dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    for gradient in gradients.values():
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
    return norms


def together(
    model: nn.Module,
    entries: Entries,
    batches_of: Callable[[int, Sequence[int]], Batches],
    optimizer_of: OptimizerOf,
    *,
    learning_rate: Callable[[int], float],
    clip_norm: float | None,
    precision: Precision = "fp32",
) -> TrainClients:
    """All clients that are asked for train at once, each as by itself, up to the rounding of sums.

    ``batches_of`` gives their batches side by side, (V, B, 3, H, W) and (V, B); ``learning_rate`` that of a round.
    Their figures are read from the device once, at the end: what went wrong is known only then.
    """

    @lru_cache(maxsize=2)  # a round's groups, and the smaller one that may be left over
    def stack_of(size: int) -> Stack:
        return Stack(model, entries, size, optimizer_of)

    def outcome(steps: Sequence[Step], figures: Tensor, values: list[Tensor]) -> Outcome:
        try:
            metrics = add_up(steps, figures)
            check_values(values, steps[-1])
            return metrics, values
        except BadUpdateError as error:
            return error

    def train_clients(number: int, clients: Sequence[int], theta: Values) -> Iterator[Outcome]:
        stack = stack_of(len(clients))
        stack.load(theta)
        batches, rate = batches_of(number, clients), learning_rate(number)
        steps = stack.train(batches, learning_rate=rate, clip_norm=clip_norm, precision=precision)
        for figures, values in zip(fetch(steps).unbind(2), stack.clients, strict=True):
            yield outcome(steps, figures, values)

    return train_clients


def in_groups(alone: TrainClients, together: TrainClients, size: int, plan: Callable[[int], Hashable]) -> TrainClients:
    """Neighbours of a round with the same ``plan`` train ``together``, up to ``size`` of them; who has none, ``alone``.

    A client's plan is its ``batch_sizes``: only batches of one shape can be stacked.
    """

    def train_clients(number: int, clients: Sequence[int], theta: Values) -> Iterator[Outcome]:
        for _, neighbours in groupby(clients, key=plan):
            same = list(neighbours)
            for start in range(0, len(same), size):
                group = same[start : start + size]
                yield from (together if len(group) > 1 else alone)(number, group, theta)

    return train_clients
