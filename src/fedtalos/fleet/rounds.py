"""A federated run of a fleet, on the server: records, checkpoints and test of a simulation, its clients elsewhere."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from fedtalos.app.config.files import flatten, groups
from fedtalos.app.config.fleet import Wire
from fedtalos.app.config.schema import EditingConfig, FederatedConfig
from fedtalos.app.federation import algorithm_of, local_training, privacy_spent, transforms_of
from fedtalos.app.load import Loaded, load
from fedtalos.app.moving import moving_parameters
from fedtalos.app.run.display import say
from fedtalos.app.run.evaluation import evaluate_split
from fedtalos.app.run.folders import begun
from fedtalos.app.run.interruption import safe_point
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.progress import Progress
from fedtalos.app.run.recorder import write_csv
from fedtalos.app.run.session import Session
from fedtalos.errors import InputError
from fedtalos.fleet.engine import on_nodes
from fedtalos.fleet.letter import Letter
from fedtalos.fleet.members import POLL, Members
from fedtalos.fleet.post import Post
from fedtalos.fleet.questions import accuracy_of_clients, fit_head_from_sums
from fedtalos.fleet.still import sha256, shapes_of, still_part
from fedtalos.models.heads import closed_form
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Round, fedavg
from fedtalos.training.federated.personal import mean_and_worst
from fedtalos.training.masked_parameters import MaskedParameters

ALGORITHM = "algorithm/"
"""Prefix of an algorithm's state in checkpoints."""


@dataclass(frozen=True)
class Terms:
    """Terms between the server and its nodes: seconds to answer in, to gather in, and the numbers on the wire."""

    deadline: float = 600.0
    patience: float = 120.0
    min_nodes: int = 1
    wire: Wire = "float32"


def run_rounds(config: FederatedConfig, post: Post, terms: Terms, console: Console) -> None:
    """Train for ``num_rounds`` rounds with the nodes that the post reaches; results are those of a simulation.

    Raises InputError for options that a fleet has not, and where too few nodes come.
    """
    refuse_what_a_fleet_has_not(config)
    with begun(config, console) as paths:
        spent = privacy_spent(config)  # first, for it may want a library
        loaded = load(config)
        moving, algorithm = moving_parameters(loaded), algorithm_of(loaded.config)
        config, total = loaded.config, loaded.config.federation.num_rounds
        rate = local_training(config).rate
        members = members_of(config, post, terms, console)
        with Session(loaded, paths, console, unit="round", total=total, rate=rate) as session:
            algorithm.state |= session.restored(ALGORITHM, len(moving))
            session.state = lambda: {f"{ALGORITHM}{name}": tensor for name, tensor in algorithm.state.items()}
            evaluate = partial(evaluate_split, loaded, moving)
            gather(loaded, moving, paths.name, members, terms)
            say(console, f"{len(members.by_client)} of {members.num_clients} nodes are ready")
            if session.fresh and (kind := closed_form(config.model.head)):
                say(console, f"fitting the {kind} head from clients' sums")
                fit_head_from_sums(loaded, moving, members, kind)
                gather(loaded, moving, paths.name, members, terms)  # it is part of what stays still, or may be
            session.progress.bytes_down, session.progress.bytes_up = _added(session.progress, members.bytes_since())
            if session.due(session.done):
                session.validate(evaluate)
            for round_ in session.shown(rounds_on_nodes(loaded, moving, algorithm, members, terms, session.done)):
                session.record(round_, *members.bytes_since())
                if session.due(round_.number):
                    session.validate(evaluate)
                else:
                    session.save()  # a round takes seconds, and the network may end any of them
            by_client = evaluate_nodes(config, paths, moving, members)
            session.finish(evaluate, {**figures(session, moving), **spent, **by_client})


def gather(loaded: Loaded[Any], moving: MaskedParameters, name: str, members: Members, terms: Terms) -> None:
    """Make the nodes ready for the model as it is, those that are not."""
    members.prepare(begin_letter(loaded, moving, name), still_part(moving))
    members.gather(terms.patience, terms.min_nodes)


def evaluate_nodes(
    config: FederatedConfig, paths: RunPaths, moving: MaskedParameters, members: Members
) -> dict[str, Any]:
    """Write client_accuracy.csv and return what the summary says of it; nothing where nothing was asked."""
    if not config.personal.client_evaluation:
        return {}
    found = accuracy_of_clients(moving, members)
    rows = [
        {"client": client, "examples": int(size), "accuracy": f"{found[client]:.6f}" if client in found else ""}
        for client, size in enumerate(members.sizes)
    ]
    write_csv(paths.results / "client_accuracy.csv", rows)
    return {"client_test_accuracy": mean_and_worst(np.array([found.get(row, math.nan) for row in range(len(rows))]))}


def _added(progress: Progress, more: tuple[int, int]) -> tuple[int, int]:
    return progress.bytes_down + more[0], progress.bytes_up + more[1]


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


def clients_of_sizes(loaded: Loaded[Any], sizes: np.ndarray[Any, np.dtype[np.int64]]) -> Clients:
    """Clients by their numbers of images alone, which is all that the server knows of them."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Clients(loaded.data.train, np.zeros(0, np.int64), offsets)


def members_of(config: FederatedConfig | EditingConfig, post: Post, terms: Terms, console: Console) -> Members:
    """The run's nodes, as yet unknown."""

    def pause() -> None:
        safe_point()
        time.sleep(POLL)

    return Members(post, config.split.num_clients, deadline=terms.deadline, note=partial(say, console), pause=pause)


def begin_letter(loaded: Loaded[Any], moving: MaskedParameters, run: str) -> Letter:
    """Everything that a node has to know before its first work, but for the still part of the model itself."""
    facts, known = loaded.facts(), groups(FederatedConfig)
    return Letter(
        "begin",
        {
            "name": run,
            "options": {name: value for name, value in flatten(loaded.config).items() if name in known},
            "still": sha256(still_part(moving)),
            "shapes": shapes_of(moving),
            "model": json.loads(json.dumps({key: value for key, value in facts.items() if key != "classes"})),
            "classes": list(facts["classes"]),
            "data": loaded.data.fingerprint,
        },
    )


def figures(session: Session, moving: MaskedParameters) -> dict[str, Any]:
    """Figures of a fleet's run that the summary has beside accuracy."""
    progress = session.progress
    sent = {"down": round(progress.bytes_down / 1e6, 3), "up": round(progress.bytes_up / 1e6, 3)}
    lost = {"clients_left_out": progress.left_out} if progress.left_out else {}
    return {"moving_parameters": len(moving), "megabytes_sent": sent, **lost}


def refuse_what_a_fleet_has_not(config: FederatedConfig) -> None:
    """InputError for options that only a simulation has."""
    if config.federation.workers > 1:
        raise InputError(
            f"workers {config.federation.workers}: a fleet's clients have machines of their own; leave it out"
        )
    if config.apart.asked:
        asked = "one_shot" if config.apart.one_shot else "tasks"
        raise InputError(f"{asked}: vectors that train apart are made in a simulation alone; leave it out")
    if config.model.head == "linear":
        raise InputError("head linear: a fleet does not train it alone; ridge and ncm come from the clients' sums")
    if config.personal.personalise_steps:
        raise InputError("personalise_steps: a fleet does not fine-tune for each client; leave it out")
