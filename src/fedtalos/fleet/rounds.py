"""A federated run of a fleet, on the server: records, checkpoints and test of a simulation, its clients elsewhere."""

from collections.abc import Iterator
from functools import partial

from rich.console import Console

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.federation import algorithm_of, local_training, privacy_spent, transforms_of
from fedtalos.app.load import Loaded, load
from fedtalos.app.moving import moving_parameters
from fedtalos.app.run.display import say
from fedtalos.app.run.evaluation import evaluate_split
from fedtalos.app.run.folders import begun
from fedtalos.app.run.session import Session
from fedtalos.errors import InputError
from fedtalos.fleet.engine import on_nodes
from fedtalos.fleet.gathering import Terms, clients_of_sizes, gather, members_of
from fedtalos.fleet.members import Members
from fedtalos.fleet.one_shot import run_one_shot
from fedtalos.fleet.post import Post
from fedtalos.fleet.questions import evaluate_nodes, fit_head_from_sums
from fedtalos.models.heads import closed_form
from fedtalos.training.federated.fedavg import FedAvg, Round, fedavg
from fedtalos.training.masked_parameters import MaskedParameters


def run_rounds(config: FederatedConfig, post: Post, terms: Terms, console: Console) -> None:
    """Train for ``num_rounds`` rounds, or in one, with the nodes that the post reaches; results as in a simulation.

    Raises InputError for options that a fleet does not support, and where too few nodes come.
    """
    refuse_what_a_fleet_has_not(config)
    with begun(config, console) as paths:
        if config.apart.one_shot:
            run_one_shot(config, paths, post, terms, console)
            return
        spent = privacy_spent(config)  # first, for it may want a library
        loaded = load(config)
        moving, algorithm = moving_parameters(loaded), algorithm_of(loaded.config)
        config, total = loaded.config, loaded.config.federation.num_rounds
        rate = local_training(config).rate
        members = members_of(config, post, terms, console)
        with Session(loaded, paths, console, unit="round", total=total, rate=rate) as session:
            session.keep_algorithm(algorithm, len(moving))
            evaluate = partial(evaluate_split, loaded, moving)
            gather(loaded, moving, paths.name, members, terms)
            say(console, f"{len(members.by_client)} of {members.num_clients} nodes are ready")
            if session.fresh and (kind := closed_form(config.model.head)):
                say(console, f"fitting the {kind} head from clients' sums")
                fit_head_from_sums(loaded, moving, members, kind)
                gather(loaded, moving, paths.name, members, terms)  # it is part of what stays still, or may be
            session.keep_start(moving)
            session.progress.count(*members.bytes_since())
            if session.due(session.done):
                session.validate(evaluate)
            for round_ in session.shown(rounds_on_nodes(loaded, moving, algorithm, members, terms, session.done)):
                session.record(round_, *members.bytes_since())
                if session.due(round_.number):
                    session.validate(evaluate)
                else:
                    session.save()  # a round takes seconds, and the network may end any of them
            by_client = evaluate_nodes(config, paths, moving, members)
            session.finish(evaluate, {**session.progress.figures(len(moving)), **spent, **by_client})


def rounds_on_nodes(
    loaded: Loaded[FederatedConfig],
    moving: MaskedParameters,
    algorithm: FedAvg,
    members: Members,
    terms: Terms,
    done: int,
) -> Iterator[Round]:
    """Run the rounds after ``done``; a client that first comes in the middle of a run counts from then on."""
    config = loaded.config
    local, federation = local_training(config), config.federation
    while done < federation.num_rounds:
        sizes = members.sizes.copy()
        clients = clients_of_sizes(loaded, sizes)
        for round_ in fedavg(
            moving,
            clients,
            local=local,
            rounds=federation.num_rounds,
            fraction=federation.client_fraction,
            sampling=federation.client_sampling,
            seed=config.run.seed,
            algorithm=algorithm,
            through=transforms_of(config, clients, local),
            engine=partial(on_nodes, members=members, wire=terms.wire),
            on_bad_client=config.failures.on_bad_client,
            done=done,
        ):
            done = round_.number
            yield round_
            if done < federation.num_rounds:  # else rounds would pass with nobody in them
                members.gather(terms.patience, terms.min_nodes, wanted=terms.min_nodes)
            if (members.sizes != sizes).any():
                break


def refuse_what_a_fleet_has_not(config: FederatedConfig) -> None:
    """InputError for options that only a simulation has."""
    if config.federation.workers > 1:
        raise InputError(
            f"workers {config.federation.workers}: a fleet's clients have machines of their own; leave it out"
        )
    if config.apart.tasks is not None:
        raise InputError("tasks: a fleet's clients have the classes that they have; leave it out, or take one_shot")
    if config.model.head == "linear":
        raise InputError("head linear: a fleet does not train it alone; ridge and ncm come from the clients' sums")
    if config.personal.personalise_steps:
        raise InputError("personalise_steps: a fleet does not fine-tune for each client; leave it out")
