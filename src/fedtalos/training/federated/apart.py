"""Training apart: clients, or the clients of a task, train from one start, and each leaves its own task vector.

Letters: K clients, U units (a client, or a task's clients), A entries that move. A vector is theta_after minus start.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedtalos.models.backbone import Backbone
from fedtalos.randomness import generator
from fedtalos.training.entries import Values
from fedtalos.training.federated.client_sampling import Sampling
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import (
    Engine,
    FedAvg,
    Lost,
    OnBadClient,
    Round,
    Transform,
    Update,
    Updates,
    fedavg,
    one_by_one,
)
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

Keep = Callable[[int, Tensor], None]
"""Takes the number of a unit that has trained, and its vector (A,)."""


def train_apart(
    model: Backbone | MaskedParameters,
    clients: Clients,
    mask: Mapping[str, Tensor] | None = None,
    *,
    local: LocalTraining,
    units: Sequence[Sequence[int]] | None = None,
    rounds: int = 1,
    fraction: float = 1.0,
    sampling: Sampling = "uniform",
    seed: int = 0,
    keep: Keep,
    start: Tensor | None = None,
    onward: bool = False,
    algorithm: Callable[[], FedAvg] = FedAvg,
    through: Callable[[Clients, int], Sequence[Transform]] = lambda _clients, _seed: (),
    engine: Engine = one_by_one,
    on_bad_client: OnBadClient = "stop",
    done: int = 0,
) -> Iterator[Round]:
    """Train every unit by ``rounds`` rounds of federated averaging among its clients alone, all from one start.

    ``units`` are the numbers of each one's clients, such as ``clients_of_tasks`` gives (None: every client by itself).
    Yields their rounds one after another, numbered through; after a unit's last one ``keep`` is given its vector. In
    the end the model is as it was.

    ``start`` (A,) is what every unit starts from, where that is not what the model holds: after ``done`` rounds the
    model holds what the unit underway has reached. With ``onward`` every unit starts where the one before it ended, as
    in continual learning, and its vector leads from the common start to its end. A unit's draws depend on its clients
    and the seed alone, so they are the same whichever units train.

    Units that take one round of all their clients are that round of federated averaging among all clients: the
    ``engine`` is asked for all of them at once, so that they share its stacks, or train side by side elsewhere.

    >>> vectors = {}
    >>> for round in train_apart(model, clients, mask, local=LocalTraining(epochs=2), keep=vectors.__setitem__):
    ...     print(round.number, round.train.accuracy)
    """
    moving = MaskedParameters.of(model, mask)
    start = moving.vector() if start is None else start
    units = [range(client, client + 1) for client in range(len(clients))] if units is None else units
    left = units[done // rounds :]
    if at_once(rounds, fraction, onward=onward):
        engine = shared_round(engine(moving, clients, local, seed, algorithm()), left)
    for unit, members in enumerate(left, done // rounds):
        first = max(done - unit * rounds, 0)
        if not first and not (onward and unit):
            moving.write(start)
        own = clients.only(members)
        for round_ in fedavg(
            moving,
            own,
            local=local,
            rounds=rounds,
            fraction=fraction,
            sampling=sampling,
            seed=unit_seed(seed, members),
            algorithm=algorithm(),
            through=through(own, unit_seed(seed, members)),
            engine=engine,
            on_bad_client=on_bad_client,
            done=first,
        ):
            yield replace(
                round_,
                number=unit * rounds + round_.number,
                clients=tuple(members[client] for client in round_.clients),
                lost={members[client]: lost for client, lost in round_.lost.items()},
            )
        keep(unit, moving.vector() - start)
    moving.write(start)


def at_once(rounds: int, fraction: float, *, onward: bool = False) -> bool:
    """Tell whether units train in one round of all their clients, all from one start, so that all can train at once.

    >>> at_once(1, 1.0), at_once(1, 1.0, onward=True), at_once(1, 0.5)
    (True, False, False)
    """
    return rounds == 1 and fraction == 1 and not onward


def shared_round(everybody: Updates, units: Sequence[Sequence[int]]) -> Engine:
    """Make an engine of units, one after another, of one round of all their clients, asked for at the first one's turn.

    >>> engine = shared_round(stacked(moving, clients, local, 0, FedAvg(), size=10), [[0, 1], [2, 3]])
    """
    turns, answers = iter(units), list[Iterator[tuple[int, Update | Lost]]]()

    def engine(*_: object) -> Updates:
        members = next(turns)

        def updates(number: int, chosen: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
            if not answers:
                answers.append(everybody(number, [client for members in units for client in members], theta))
            for client in chosen:  # transforms may have left some out
                yield client, next(answer for other, answer in answers[0] if other == members[client])

        return updates

    return engine


def unit_seed(seed: int, members: Sequence[int]) -> int:
    """Draw the seed of a unit's rounds, and of batches where it takes several, from its first client.

    >>> unit_seed(0, [3]) == unit_seed(0, range(3, 4))
    True
    """
    return int(generator(seed, "apart", members[0]).integers(2**31))
