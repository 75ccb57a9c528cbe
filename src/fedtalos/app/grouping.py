"""Clients of a round that train together on one device: how many, and from which batches."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.app.config.schema import ADJUST_GRADIENTS, FederatedConfig, TrainOptions
from fedtalos.app.moving import optimizer_of
from fedtalos.app.run.launch import number_of_processes
from fedtalos.app.setup import Setup
from fedtalos.data.batches import batch_sizes, stacked_batches
from fedtalos.errors import InputError
from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import TrainClients, clients_per_round
from fedtalos.training.federated.stacked import Stack, in_groups, together
from fedtalos.training.loop import Batches, fetch, train
from fedtalos.training.masked_parameters import Entries

MEASURED_STEPS = 4


def grouped(
    alone: TrainClients,
    config: FederatedConfig,
    setup: Setup,
    entries: Entries,
    clients: Clients,
    steps: Callable[[int], int],
    rate: Callable[[float], float],
    watch: Callable[[Batches, float], Batches],
) -> TrainClients:
    """``alone``, but that up to ``clients_at_once`` clients train together.

    ``steps``: a client's in a round; ``rate``: the learning rate by rounds done; ``watch`` is given a group's
    batches and how many clients' work of a round each of them is.
    """
    options, size = config.train, config.federation.clients_at_once
    if size in (None, 1):
        return alone

    def batches_of(number: int, group: Sequence[int]) -> Batches:
        rngs = [generator(config.run.seed, "batches", number, client) for client in group]
        batches = _batches(setup, options, [clients[client] for client in group], steps(group[0]), rngs)
        return watch(batches, len(group) / steps(group[0]))

    def plan(client: int) -> tuple[int, ...]:
        return batch_sizes(len(clients[client]), options.batch_size, steps(client))

    in_one_stack = together(
        setup.model,
        entries,
        batches_of,
        partial(optimizer_of, options),
        learning_rate=lambda number: rate(number - 1),
        clip_norm=options.clip_norm,
        precision=setup.precision,
    )
    return in_groups(alone, in_one_stack, size, plan)


def _batches(
    setup: Setup,
    options: TrainOptions,
    indices: Sequence[NDArray[np.int64]],
    steps: int,
    rngs: Sequence[np.random.Generator],
) -> Iterator[tuple[Tensor, Tensor]]:
    assert options.augmentation != "auto"
    return stacked_batches(
        setup.dataset.train,
        indices,
        setup.view,
        steps=steps,
        batch_size=options.batch_size,
        augmentation=options.augmentation,
        rngs=rngs,
    )


def settle_clients_at_once(
    config: FederatedConfig, setup: Setup, entries: Entries, optimizer: Optimizer, clients: Clients, console: Console
) -> FederatedConfig:
    """The config with ``clients_at_once`` settled: as given, else 1, but on CUDA what is fastest, measured.

    The model does not move: the measured steps have learning rate 0.
    """
    federation, options = config.federation, config.train
    ours = isinstance(setup.model, VisionTransformer)
    if not ours and (federation.clients_at_once or 1) > 1:
        asked = f"--clients_at_once {federation.clients_at_once}"
        raise InputError(f"{asked}: {setup.model.architecture} cannot be stacked; leave it out")
    if federation.clients_at_once is not None:
        return config
    size = 1  # also where activations are kept (stacks compute them anew), or gradients are adjusted client by client
    alone = (setup.frozen_stages and options.augmentation == "none") or config.algorithm.algorithm in ADJUST_GRADIENTS
    if ours and setup.device.type == "cuda" and not alone:
        batch = next(_batches(setup, options, [clients[0]], 1, [generator(config.run.seed, "measurement")]))
        seconds = seconds_a_step(
            partial(_steps, setup, entries, optimizer, options, batch),
            -(-clients_per_round(len(clients), federation.client_fraction) // number_of_processes(config)),
        )
        size = min(seconds, key=lambda size: seconds[size])
        found = ", ".join(f"{size}: {1e3 * took:.2f}" for size, took in seconds.items())
        console.print(
            f"clients at once: {size} (ms a client's step, by clients at once: {found})",
            highlight=False,
            soft_wrap=True,
        )
    return config.model_copy(update={"federation": federation.model_copy(update={"clients_at_once": size})})


def _steps(
    setup: Setup,
    entries: Entries,
    optimizer: Optimizer,
    options: TrainOptions,
    batch: tuple[Tensor, Tensor],
    size: int,
) -> Callable[[], object]:
    """A call that takes ``MEASURED_STEPS`` steps of ``size`` clients on copies of the batch (1, B, 3, S, S), (1, B)."""
    images, labels = batch
    if size == 1:
        return partial(
            train,
            setup.model,
            [(images[0], labels[0])] * MEASURED_STEPS,
            optimizer,
            entries,
            learning_rate=lambda _: 0.0,
            clip_norm=options.clip_norm,
            precision=setup.precision,
        )
    stack = Stack(setup.model, entries, size, partial(optimizer_of, options))
    batches = [(images.expand(size, *images.shape[1:]).clone(), labels.expand(size, -1))] * MEASURED_STEPS
    return lambda: fetch(
        stack.train(batches, learning_rate=0.0, clip_norm=options.clip_norm, precision=setup.precision)
    )


def seconds_a_step(steps_of: Callable[[int], Callable[[], object]], most: int) -> dict[int, float]:
    """Seconds of one client's step, by how many of ``most`` clients train at once: by itself, then ever larger groups.

    Ends where a larger group is no faster than the one before, or does not fit. ``steps_of`` makes the call that takes
    ``MEASURED_STEPS`` steps and waits for the device.
    """
    found: dict[int, float] = {}
    for size in sorted({-(-most // 2**halvings) for halvings in range(most.bit_length() + 1)}):
        try:
            steps = steps_of(size)
            steps()  # the first call also sets up
            start = time.perf_counter()
            steps()
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            break
        smaller = max(found, default=1)
        found[size] = (time.perf_counter() - start) / (MEASURED_STEPS * size)
        if smaller > 1 and found[size] > found[smaller]:  # the smallest group may lose where larger ones win
            break
    return found
