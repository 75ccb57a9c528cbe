"""Federated averaging (McMahan et al., 2017, algorithm 1) as a generator of rounds.

Letters: K clients, C fraction sampled per round, theta the values of what may move.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.errors import BadUpdateError, InputError, check_word
from fedtalos.metrics import Metrics
from fedtalos.models.backbone import Backbone
from fedtalos.randomness import generator
from fedtalos.training.entries import Values, all_finite
from fedtalos.training.federated.aggregation import Aggregation, TooFewError, WeightedMean
from fedtalos.training.federated.client_sampling import Sampling, clients_per_round, sample_clients
from fedtalos.training.federated.clients import Clients, Integers
from fedtalos.training.local_training import LocalTraining, Watch, unwatched
from fedtalos.training.masked_parameters import MaskedParameters


@dataclass(frozen=True)
class Update:
    """An answer of a client: its values in theta's parts, metrics of its training, and an algorithm's own reply.

    The values are good until the next client's update is asked for.
    """

    values: list[Tensor]
    metrics: Metrics
    reply: Tensor | None = None


@dataclass(frozen=True)
class Lost:
    """A client whose update does not count, and why; ``sent``: it sent something all the same."""

    why: str
    sent: bool = False


Updates = Callable[[int, Sequence[int], Values], Iterator[tuple[int, Update | Lost]]]
"""(round, clients, theta) -> each client with its update, in the clients' order; every client starts from theta."""

Transform = Callable[[Updates], Updates]
"""Changes updates on their way to the server: clipping, attacks, drop-outs."""


OnBadClient = Literal["stop", "skip"]


@dataclass(frozen=True)
class Round:
    """One round: its number (1..), clients sampled, training metrics of those that count, and clients lost."""

    number: int
    clients: tuple[int, ...] = ()
    train: Metrics = field(default_factory=Metrics)
    lost: Mapping[int, Lost] = field(default_factory=dict)
    too_few: str = ""
    """Why nothing came of the clients that were not lost, where they were too few; theta stayed as it was."""


class Trained(Protocol):
    """Values that a client trains, (A,), or V clients in one stack, (V, A): ``MaskedParameters`` or a ``Stack``."""

    def vector(self) -> Tensor:
        """Copy the values that move."""
        ...


class Correction(Protocol):
    """A change to a client's gradients, and, when it has trained, its reply to the server beside its values.

    Of clients that train in one stack there is one for all, and gradients and replies are (V, A). What is not equal in
    every round is an attribute that is a tensor, so that a captured step can be given another round's.
    """

    @property
    def reply(self) -> Tensor | None: ...
    def __call__(self, gradient: Tensor, /) -> Tensor: ...


class FedAvg:
    """Federated averaging: clients train alone, the server takes their mean, weighted by their numbers of images.

    Other algorithms override what they do differently. ``aggregation`` makes what takes the mean's place
    (``robust``, ``noisy_mean``). ``state`` is all that an algorithm keeps between rounds.

    >>> rounds = fedavg(model, clients, local=LocalTraining(), rounds=10, algorithm=FedAvg())
    """

    vectors_sent = 1
    """Vectors of what moves that a client gets, and sends, in a round."""
    corrects_gradients = False
    """True: clients change their gradients."""

    def __init__(self, *, aggregation: "MakeAggregation" = WeightedMean) -> None:
        self.aggregation = aggregation
        self.state: dict[str, Tensor] = {}

    # On the client

    def client_side(self, trained: Trained, message: Tensor | None, steps: int) -> Correction | None:
        """Make the correction of a client's gradients over its ``steps``; asked when ``trained`` holds theta.

        V clients in one stack are asked for at once: ``message`` is (V, A) then.
        """
        return None

    # On the server

    def weights(self, sizes: Integers, local: LocalTraining) -> NDArray[np.number[Any]]:
        """Weights of the clients in the mean, (K,), from their numbers of images."""
        return sizes

    def message(self, moving: MaskedParameters, client: int) -> Tensor | None:
        """Make what the server sends a client beside theta, (A,)."""
        return None

    def server_side(self, moving: MaskedParameters, theta: Values, replies: Mapping[int, Tensor | None]) -> None:
        """Make the new theta in the model, which holds the mean of the clients that ``replies`` names.

        State changes here alone, so an update that was refused leaves no trace.
        """


MakeAggregation = Callable[[MaskedParameters, float], Aggregation]
"""(what moves, clients of a round, a float where that is only expected) -> what takes their updates in."""

Engine = Callable[[MaskedParameters, Clients, LocalTraining, int, FedAvg], Updates]
"""(what moves, clients, their training, seed, algorithm) -> how clients train: one by one, in a stack, in processes."""


def one_by_one(
    moving: MaskedParameters,
    clients: Clients,
    local: LocalTraining,
    seed: int,
    algorithm: FedAvg,
    *,
    watch: Watch = unwatched,
    message: Callable[[int], Tensor | None] | None = None,
) -> Updates:
    """Train clients one after another on the one model, so memory does not grow with their number.

    ``message`` replaces the algorithm's own, where another process is the server.
    """

    def updates(number: int, chosen: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
        rate = local.rate(number - 1)
        for client in chosen:
            moving.load(theta)
            ids = clients[client]
            if len(ids) == 0:
                yield client, Lost("no images")
                continue
            sent = algorithm.message(moving, client) if message is None else message(client)
            correction = algorithm.client_side(moving, sent, local.steps_for(len(ids)))
            try:
                metrics = local.run(
                    moving,
                    clients.images,
                    ids,
                    generator(seed, "batches", number, client),
                    correction,
                    learning_rate=rate,
                    watch=watch,
                    share=1 / len(chosen),
                )
            except BadUpdateError as error:
                yield client, Lost(str(error), sent=True)
            else:
                yield client, Update(moving.rows, metrics, None if correction is None else correction.reply)

    return updates


def checked(update: Update | Lost, theta: Values, *, finite: bool, entries: int | None = None) -> Update | Lost:
    """Count an update as lost where its values are not shaped as theta's, or not ``finite`` where they have to be.

    Values that are too few would be spread over all. A reply, which an algorithm keeps, is one finite number for each
    of the ``entries`` that move (None: of any).
    """
    if isinstance(update, Lost):
        return update
    if [part.shape for part in update.values] != [part.shape for part in theta.parts]:
        sent = sum(part.numel() for part in update.values)
        return Lost(
            f"expected {theta.vector.numel()} values in {len(theta.parts)} tensors, "
            f"got {sent} in {len(update.values)} or in other shapes; nothing of it was kept",
            sent=True,
        )
    if finite and not all_finite(update.values):
        return Lost("the update is not finite; nothing of it was kept; try a lower learning_rate", sent=True)
    if (reply := update.reply) is not None and not (len(reply) == (entries or len(reply)) and all_finite([reply])):
        return Lost("the reply beside the update is cut, or not finite; nothing of it was kept", sent=True)
    return update


def fedavg(
    model: Backbone | MaskedParameters,
    clients: Clients,
    mask: Mapping[str, Tensor] | None = None,
    *,
    local: LocalTraining,
    rounds: int,
    fraction: float = 0.1,
    sampling: Sampling = "uniform",
    seed: int = 0,
    algorithm: FedAvg | None = None,
    through: Sequence[Transform] = (),
    engine: Engine = one_by_one,
    on_bad_client: OnBadClient = "stop",
    done: int = 0,
) -> Iterator[Round]:
    """Train federatedly: yield rounds done+1..rounds; after each, the model holds the new global values.

    theta <- sum over sampled clients of n_k theta_k / sum of n_k, or what ``algorithm`` makes of their updates. Only
    the ``mask``'s True entries move (None: everything). A round has ``fraction`` of the clients: a fixed number of
    them, or with ``sampling`` poisson each with that probability; where none comes, theta stays, but for noise.
    ``through`` are transforms of updates, the first nearest to the client. A client whose training diverges, or whose
    update cannot be used, raises BadUpdateError and leaves theta in place; with ``on_bad_client`` "skip" the round goes
    on without it. So does TooFewError, of clients that are too few for a robust rule; then "skip" skips the round.

    >>> for round in fedavg(model, clients, mask, local=LocalTraining(steps=4, learning_rate=1e-3), rounds=100):
    ...     print(round.number, round.train.accuracy)
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction {fraction}: expected a share of clients above 0 and at most 1, such as 0.1")
    check_word("sampling", sampling, Sampling)
    check_word("on_bad_client", on_bad_client, OnBadClient)
    algorithm = algorithm or FedAvg()
    moving = MaskedParameters.of(model, mask)
    updates = reduce(
        lambda inner, transform: transform(inner), through, engine(moving, clients, local, seed, algorithm)
    )
    weights = algorithm.weights(clients.sizes, local)
    expected = fraction * len(clients) if sampling == "poisson" else clients_per_round(len(clients), fraction)
    mean = algorithm.aggregation(moving, expected)
    theta = moving.copy()
    for number in range(done + 1, rounds + 1):
        theta.take(moving.rows)
        metrics = Metrics()
        chosen = sample_clients(len(clients), fraction, seed, number, sampling)
        replies, lost = dict[int, Tensor | None](), dict[int, Lost]()
        try:
            for client, answer in updates(number, chosen, theta):
                update = checked(answer, theta, finite=mean.needs_finite, entries=len(moving))
                if isinstance(update, Lost):
                    if update.sent and on_bad_client == "stop":
                        raise BadUpdateError(f"round {number}, client {client}: {update.why}")
                    lost[client] = update
                    continue
                mean.add(update.values, float(weights[client]))
                metrics += update.metrics
                replies[client] = update.reply
        finally:
            moving.load(theta)
        too_few = ""
        if replies or mean.writes_alone:
            try:
                mean.write(number)
            except TooFewError as error:
                if on_bad_client == "stop":
                    raise TooFewError(f"{error}; on_bad_client skip passes over such a round") from error
                metrics, too_few = Metrics(), str(error)
            else:
                moving.note_training()
                algorithm.server_side(moving, theta, replies)
        yield Round(number, chosen, metrics, lost, too_few)
