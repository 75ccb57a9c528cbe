"""Federated averaging (McMahan et al., 2017, algorithm 1) as a generator of rounds.

Letters: K clients, C fraction sampled per round, theta the values of what may move.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtalos.metrics import Metrics
from fedtalos.randomness import generator
from fedtalos.training.federated.aggregation import Aggregation, WeightedMean
from fedtalos.training.federated.algorithms.server import ServerRule
from fedtalos.training.loop import BadUpdateError
from fedtalos.training.masked_parameters import Entries, Values, named_tensors

ClientUpdate = Callable[[int, int], Metrics]
"""(round, client) -> training metrics; trains the resident model in place, from the values it finds there."""

Outcome = tuple[Metrics, list[Tensor]] | BadUpdateError
"""A client's metrics and trained values, in theta's parts; or what made its training of no use."""

TrainClients = Callable[[int, Sequence[int], Values], Iterator[Outcome]]
"""(round, clients, theta) -> each client's outcome, in the clients' order.

Every client starts from theta; its values are good until the next client's are asked for.
"""

Absence = Callable[[int, int], str | None]
"""(round, client) -> why the client, though sampled, answers nothing in that round; None where it does."""

OnBadClient = Literal["stop", "skip"]


@dataclass(frozen=True)
class Round:
    """One aggregation: its number (1..), the clients sampled, the training metrics of those averaged, bytes sent."""

    number: int
    clients: tuple[int, ...]
    train: Metrics
    bytes_down: int
    bytes_up: int
    absent: dict[int, str] = field(default_factory=dict)
    """Clients that sent nothing, and why."""
    bad: dict[int, str] = field(default_factory=dict)
    """Clients left out for what came of their training, and what that was."""


def clients_per_round(num_clients: int, fraction: float) -> int:
    """max(1, round(C K))."""
    return max(1, round(fraction * num_clients))


def sample_clients(num_clients: int, fraction: float, seed: int, round_number: int) -> tuple[int, ...]:
    """The clients of a round: different, uniformly drawn, a function of seed and round only; ascending."""
    count = clients_per_round(num_clients, fraction)
    chosen = generator(seed, "clients", round_number).choice(num_clients, size=count, replace=False)
    return tuple(sorted(int(client) for client in chosen))


def one_by_one(model: nn.Module, entries: Entries, update_client: ClientUpdate) -> TrainClients:
    """Clients train one after another, on the resident model: memory does not grow with their number."""
    resident = entries.moving_rows(named_tensors(model))

    def outcome(number: int, client: int) -> Outcome:
        try:
            return update_client(number, client), resident
        except BadUpdateError as error:
            return error

    def train_clients(number: int, clients: Sequence[int], theta: Values) -> Iterator[Outcome]:
        for client in clients:
            torch._foreach_copy_(resident, theta.parts)
            yield outcome(number, client)

    return train_clients


def useful(outcome: Outcome, theta: Values) -> tuple[Metrics, list[Tensor]]:
    """The outcome's metrics and values.

    Raises BadUpdateError where it is one, or values are not shaped as theta's parts: one too short would be spread
    over all.
    """
    if isinstance(outcome, BadUpdateError):
        raise outcome
    _, values = outcome
    if [part.shape for part in values] != [part.shape for part in theta.parts]:
        sent = sum(part.numel() for part in values)
        raise BadUpdateError(
            f"expected {theta.vector.numel()} values in {len(theta.parts)} tensors, "
            f"got {sent} in {len(values)} or in other shapes; nothing of it was kept"
        )
    return outcome


def fedavg(
    model: nn.Module,
    entries: Entries,
    train_clients: TrainClients,
    client_weights: NDArray[np.number[Any]],
    *,
    fraction: float,
    rounds: int,
    seed: int,
    done: int = 0,
    first_contact_bytes: int = 0,
    aggregation: Aggregation | None = None,
    server: ServerRule | None = None,
    vectors_sent: int = 1,
    absent: Absence = lambda _number, _client: None,
    on_bad_client: OnBadClient = "stop",
) -> Iterator[Round]:
    """Yield rounds done+1..rounds; after each, ``model`` holds the new global values.

    theta <- sum over sampled clients of n_k theta_k / sum of n_k, or what another ``aggregation`` makes of them.
    n_k are the ``client_weights`` (K,), numbers of images. What does not move, but lies between what does, is
    averaged along: equal values stay as they are. Where there is a ``server`` rule, it makes the new theta of that
    mean. Bytes are those of the entries that may move, ``vectors_sent`` times down and up for every client, and
    ``first_contact_bytes`` (the mask's bits) down to each client the first time that it is sampled.

    Clients that are ``absent`` get theta and send nothing. One whose training, or whose values, are of no use raises
    BadUpdateError, which leaves theta in place; with ``on_bad_client`` "skip" the mean is that of the others, and
    theta, and what the server keeps, stay as they are where there is none.
    """
    resident = entries.moving_rows(tensors := named_tensors(model))
    theta = Values(resident)
    aggregation = aggregation or WeightedMean(model, entries)
    met = np.zeros(len(client_weights), dtype=np.bool_)
    for number in range(1, done + 1):
        met[list(sample_clients(len(client_weights), fraction, seed, number))] = True
    for number in range(done + 1, rounds + 1):
        torch._foreach_copy_(theta.parts, resident)
        before = None if server is None else entries.gather(tensors)
        clients = sample_clients(len(client_weights), fraction, seed, number)
        missing = {client: why for client in clients if (why := absent(number, client)) is not None}
        present = [client for client in clients if client not in missing]
        train, bad = Metrics(), dict[int, str]()
        try:
            for client, outcome in zip(present, train_clients(number, present, theta), strict=True):
                try:
                    metrics, values = useful(outcome, theta)
                    aggregation.add(values, float(client_weights[client]))
                    train += metrics
                except BadUpdateError as error:
                    if on_bad_client == "stop":
                        raise BadUpdateError(f"round {number}, client {client}: {error}") from error
                    bad[client] = str(error)
        finally:
            torch._foreach_copy_(resident, theta.parts)
        if averaged := [client for client in present if client not in bad]:
            aggregation.write(number)
            if server is not None and before is not None:
                entries.scatter(server(averaged, before, entries.gather(tensors)), tensors)
        new = len(clients) - int(met[list(clients)].sum())
        met[list(clients)] = True
        wire = entries.nbytes * vectors_sent
        bytes_down = wire * len(clients) + first_contact_bytes * new
        yield Round(number, clients, train, bytes_down, wire * len(present), missing, bad)
