"""Federated averaging (McMahan et al., 2017, algorithm 1) as a generator of rounds.

Letters: K clients, C fraction sampled per round, A entries that may move, theta (A,) their values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtalos.metrics import Metrics
from fedtalos.parameters import Entries, named_tensors
from fedtalos.randomness import generator

ClientUpdate = Callable[[int, int], Metrics]
"""(round, client) -> training metrics; trains the resident model in place, from the values it finds there."""


@dataclass(frozen=True)
class Round:
    """One aggregation: its number (1..), the clients that took part, their training metrics, bytes sent."""

    number: int
    clients: tuple[int, ...]
    train: Metrics
    bytes_down: int
    bytes_up: int


def clients_per_round(num_clients: int, fraction: float) -> int:
    """max(1, round(C K))."""
    return max(1, round(fraction * num_clients))


def sample_clients(num_clients: int, fraction: float, seed: int, round_number: int) -> tuple[int, ...]:
    """The clients of a round: different, uniformly drawn, a function of seed and round only; ascending."""
    count = clients_per_round(num_clients, fraction)
    chosen = generator(seed, "clients", round_number).choice(num_clients, size=count, replace=False)
    return tuple(sorted(int(client) for client in chosen))


def fedavg(
    model: nn.Module,
    entries: Entries,
    update_client: ClientUpdate,
    client_sizes: NDArray[np.integer[Any]],
    *,
    fraction: float,
    rounds: int,
    seed: int,
    done: int = 0,
    first_contact_bytes: int = 0,
) -> Iterator[Round]:
    """Yield rounds done+1..rounds; after each, ``model`` holds the new global values.

    theta <- sum over sampled clients of n_k theta_k / sum of n_k, kept as a running mean in one buffer: memory does
    not grow with the number of clients. Bytes are those of theta's buffer, down and up for every client, and
    ``first_contact_bytes`` (the mask's bits) down to each client the first time that it is sampled.
    """
    tensors = named_tensors(model)
    met = {
        client for number in range(1, done + 1) for client in sample_clients(len(client_sizes), fraction, seed, number)
    }
    for number in range(done + 1, rounds + 1):
        theta = entries.gather(tensors)
        mean = torch.zeros_like(theta)
        clients = sample_clients(len(client_sizes), fraction, seed, number)
        train, examples = Metrics(), 0
        for client in clients:
            entries.scatter(theta, tensors)
            train += update_client(number, client)
            size = int(client_sizes[client])
            examples += size
            mean.lerp_(entries.gather(tensors), size / examples)
        entries.scatter(mean, tensors)
        new = set(clients) - met
        met |= new
        wire = theta.nbytes * len(clients)
        yield Round(number, clients, train, wire + first_contact_bytes * len(new), wire)
