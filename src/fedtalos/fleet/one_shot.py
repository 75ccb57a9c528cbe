"""One round over a fleet: every node trains once from one start, and the vectors are merged as in a simulation."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from rich.console import Console
from torch import Tensor

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.federation import algorithm_of, local_training
from fedtalos.app.load import Loaded, load
from fedtalos.app.moving import moving_parameters
from fedtalos.app.run.apart import Apart
from fedtalos.app.run.display import say
from fedtalos.app.run.evaluation import evaluate_split
from fedtalos.app.run.holders import MergeWeights, WeighedBy
from fedtalos.app.run.kept import Kept, units_of
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.session import Session
from fedtalos.errors import InputError
from fedtalos.fleet.engine import on_nodes
from fedtalos.fleet.gathering import Terms, clients_of_sizes, gather, members_of
from fedtalos.fleet.members import Members
from fedtalos.fleet.post import Post
from fedtalos.fleet.questions import evaluate_nodes, sums_of_clients, weights_of_clients
from fedtalos.models.heads import ClosedForm, HeadSums
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Engine
from fedtalos.training.federated.traffic import Traffic
from fedtalos.training.local_training import Watch
from fedtalos.training.masked_parameters import MaskedParameters


def run_one_shot(config: FederatedConfig, paths: RunPaths, post: Post, terms: Terms, console: Console) -> None:
    """Train every node once, and merge what they learnt; results are those of a simulation."""
    if not paths.started:
        Kept(paths).check_free()
    loaded = load(config)
    config, moving = loaded.config, moving_parameters(loaded)
    members = members_of(config, post, terms, console)
    nodes, rate = FleetHolders(loaded, moving, members, terms), local_training(config).rate
    total = len(units_of(config, nodes, ()))
    with Session(loaded, paths, console, unit="round", total=total, rate=lambda _: rate(0)) as session:
        gather(loaded, moving, paths.name, members, terms)
        say(console, f"{len(members.by_client)} of {members.num_clients} nodes are ready")
        apart = Apart(loaded, nodes, moving, session)
        apart.begin(lambda *_: iter(()))  # a linear head is refused
        gather(loaded, moving, paths.name, members, terms)  # the first head is part of what stays still, or may be
        check_counted(apart, members)
        evaluate = partial(evaluate_split, loaded, moving)
        merged = apart.run(evaluate, Traffic(moving, algorithm_of(config), members.num_clients))
        by_client = {}
        if config.personal.client_evaluation:
            gather(loaded, moving, paths.name, members, terms)  # with the head that was fitted anew
            by_client = evaluate_nodes(config, paths, moving, members, apart.own_vectors())
        session.finish(evaluate, {**session.progress.figures(len(moving)), **merged, **by_client})


def check_counted(apart: Apart, members: Members) -> None:
    """InputError where a run goes on to a mean by images without a client whose vector is in it."""
    if apart.config.apart.merge != "mean":
        return
    for unit in apart.units:
        client = unit.members[0]
        if apart.kept.vector(unit.name).exists() and not members.sizes[client]:
            raise InputError(
                f"merge mean: counts the images of client {client}, which is not there; start its node, and go on "
                "with --resume"
            )


class FleetHolders:
    """Clients on machines of their own, as holders of a run whose units, a client each, train apart.

    >>> apart = Apart(loaded, FleetHolders(loaded, moving, members, Terms()), moving, session)
    """

    def __init__(
        self, loaded: Loaded[FederatedConfig], moving: MaskedParameters, members: Members, terms: Terms
    ) -> None:
        self.loaded, self.moving, self.members, self.wire = loaded, moving, members, terms.wire

    @property
    def clients(self) -> Clients:
        """The clients by their numbers of images."""
        return clients_of_sizes(self.loaded, self.members.sizes)

    def classes(self, client: int) -> tuple[int, ...]:
        member, known = self.members.by_client.get(client), range(len(self.loaded.data.classes))
        return () if member is None else tuple(sorted(set(member.classes) & set(known)))

    def engine(self, _watch: Watch) -> Engine:
        return partial(on_nodes, members=self.members, wire=self.wire)

    def head_sums(self, clients: Sequence[int], kind: ClosedForm) -> Iterator[tuple[int, HeadSums]]:
        return sums_of_clients(self.loaded, self.moving, self.members, kind, clients)

    def weights(self, rule: WeighedBy, models: Iterable[tuple[int, Tensor]]) -> Iterator[MergeWeights]:
        return weights_of_clients(self.moving, self.members, rule, models)

    def sent(self, _counted: tuple[int, int]) -> tuple[int, int]:
        return self.members.bytes_since()
