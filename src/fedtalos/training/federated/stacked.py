"""Clients of a round trained in one stack, for devices that one client's batch does not fill.

The tensors that move are stacked, a copy per client; torch.func's vmap takes the gradients of all clients at once, and
one optimiser steps the stacks, since its rules work entry by entry. Frozen tensors are shared.

Shapes: V clients that train together, B images of a batch, A chosen entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedtalos.data.batches import batch_sizes, stacked_batches
from fedtalos.devices import autocast
from fedtalos.errors import BadUpdateError, InputError
from fedtalos.models.transformer_layers import without_fused_attention
from fedtalos.randomness import generator
from fedtalos.training.entries import Entries, Values
from fedtalos.training.feature_cache import view_of
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Lost, Update, Updates, one_by_one
from fedtalos.training.local_training import LocalTraining, Watch, unwatched
from fedtalos.training.loop import Batches, Step, add_up, check_values, fetch
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.micro_batches import correct_answers
from fedtalos.training.sparse_optimizer import make_optimizer


def stacked(
    moving: MaskedParameters,
    clients: Clients,
    local: LocalTraining,
    seed: int,
    algorithm: FedAvg,
    *,
    size: int,
    watch: Watch = unwatched,
) -> Updates:
    """Train up to ``size`` neighbours of a round at once where their batches have one shape, the others one by one.

    Each client trains as it would by itself, up to the rounding of sums. Figures are read from the device once, at
    the end of a stack: what went wrong is known only then. Raises InputError for algorithms that correct gradients.

    >>> rounds = fedavg(model, clients, local=local, rounds=10, engine=partial(stacked, size=10))
    """
    if algorithm.corrects_gradients:
        raise InputError(f"{type(algorithm).__name__}: its clients correct their gradients, so they train one by one")

    @lru_cache(maxsize=2)  # a round's stacks, and the smaller one that may be left over
    def stack_of(count: int) -> Stack:
        return Stack(moving, local, count)

    def together(number: int, group: Sequence[int], theta: Values, share: float) -> Iterator[tuple[int, Update | Lost]]:
        stack, steps = stack_of(len(group)), local.steps_for(len(clients[group[0]]))
        stack.load(theta)
        batches = stacked_batches(
            clients.images,
            [clients[client] for client in group],
            view_of(moving.model),
            steps=steps,
            batch_size=local.batch_size,
            augmentation=local.augmentation,
            rngs=[generator(seed, "batches", number, client) for client in group],
        )
        taken = stack.train(watch(batches, share / steps), local.rate(number - 1))
        for client, figures, values in zip(group, fetch(taken).unbind(2), stack.clients, strict=True):
            try:
                metrics = add_up(taken, figures)
                check_values(values, taken[-1])
                yield client, Update(values, metrics)
            except BadUpdateError as error:
                yield client, Lost(str(error), sent=True)

    def plan(client: int) -> tuple[int, ...]:
        """Sizes of the client's batches: only batches of one shape can be stacked."""
        count = len(clients[client])
        return batch_sizes(count, local.batch_size, local.steps_for(count)) if count else ()

    def updates(number: int, chosen: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
        def of_one(batches: Batches, share: float) -> Batches:
            return watch(batches, share / len(chosen))

        alone = one_by_one(moving, clients, local, seed, algorithm, watch=of_one)
        for sizes, neighbours in groupby(chosen, key=plan):
            same = list(neighbours)
            for start in range(0, len(same), size):
                group = same[start : start + size]
                if len(group) == 1 or not sizes:
                    yield from alone(number, group, theta)
                else:
                    yield from together(number, group, theta, len(group) / len(chosen))

    return updates


class Stack:
    """V copies of the tensors that move, (V, *shape) each, and the one optimiser of them all."""

    def __init__(self, moving: MaskedParameters, local: LocalTraining, size: int) -> None:
        self.moving, self.model, self.local = moving, moving.model, local
        self.parameters = {name: nn.Parameter(torch.stack([tensor] * size)) for name, tensor in moving.tensors.items()}
        self.entries = Entries({name: mask.expand(size, *mask.shape) for name, mask in moving.entries.masks.items()})
        self.optimizer = make_optimizer(
            self.parameters,
            self.entries,
            rule=local.optimizer,
            learning_rate=local.rate(0),
            momentum=local.momentum,
            weight_decay=local.weight_decay,
        )
        self.clients = [
            moving.entries.moving_rows({name: stack[client] for name, stack in self.parameters.items()})
            for client in range(size)
        ]
        """Each client's values, views in the parts of ``Entries.moving_rows``."""

    def load(self, theta: Values) -> None:
        """Every client starts from theta, and with an optimiser that has seen nothing."""
        self.moving.freeze()
        for values in self.clients:
            torch._foreach_copy_(values, theta.parts)
        self.optimizer.state.clear()

    def train(self, batches: Batches, learning_rate: float) -> list[Step]:
        """Take a step of all clients per batch, (V, B, 3, H, W) and (V, B); nothing is read from the device."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with without_fused_attention(self.model):
            return [
                self._step(number, images, labels, learning_rate) for number, (images, labels) in enumerate(batches)
            ]

    def _step(self, number: int, images: Tensor, labels: Tensor, learning_rate: float) -> Step:
        def loss_and_correct(moving: dict[str, Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with autocast(images.device, self.local.precision):
                logits = functional_call(self.model, moving, (images,))
            return F.cross_entropy(logits.float(), labels), correct_answers(logits, labels)

        values = {name: stack.detach() for name, stack in self.parameters.items()}
        gradients, (losses, correct) = vmap(grad_and_value(loss_and_correct, has_aux=True))(values, images, labels)
        clip_norm = self.local.clip_norm
        norms = losses if clip_norm is None else clip_each(gradients, self.entries, clip_norm)
        for name, stack in self.parameters.items():
            stack.grad = gradients[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(number, learning_rate, labels.shape[1], losses, norms, correct)


def clip_each(gradients: Mapping[str, Tensor], entries: Entries, max_norm: float) -> Tensor:
    """Clip every client's gradient by itself, on stacks (V, *shape), in place; returns the norms found, (V,)."""
    size = len(next(iter(gradients.values())))
    norms: Tensor = torch.stack([part.view(size, -1).norm(dim=1) for part in entries.parts(gradients)]).norm(dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    for gradient in gradients.values():
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
    return norms
