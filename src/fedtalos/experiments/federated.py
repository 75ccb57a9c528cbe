"""Train with federated averaging over clients that keep their images."""

from typing import Any

from rich.console import Console

from fedtalos.config import FederatedConfig, FederationOptions
from fedtalos.data.batches import steps_per_epoch
from fedtalos.display import Display
from fedtalos.experiments.clients import fit_ridge_head, split, write_split
from fedtalos.experiments.moving import moving_entries, optimizer_for, schedule_for
from fedtalos.experiments.runs import RunPaths, open_run
from fedtalos.experiments.session import Session, resume
from fedtalos.experiments.setup import Setup, prepare
from fedtalos.metrics import Metrics
from fedtalos.randomness import generator
from fedtalos.training.fedavg import clients_per_round, fedavg


def run(config: FederatedConfig, paths: RunPaths, console: Console) -> dict[str, Any]:
    """Train for ``num_rounds`` rounds; returns the summary."""
    config, setup = prepare(config)
    federation = config.federation
    clients = split(setup, config.split, config.run.seed)
    entries = moving_entries(setup, config.train)
    open_run(config, paths, setup.inputs())
    write_split(paths, setup, clients)
    optimizer = optimizer_for(setup, entries, config.train)
    rate = schedule_for(config.train, federation.num_rounds)
    progress, saved = resume(paths, setup)
    if not saved and setup.head == "ridge":
        console.print("fitting the ridge head", highlight=False)
        progress.bytes_up += fit_ridge_head(setup, clients)

    per_round = clients_per_round(len(clients), federation.client_fraction)

    def update_client(number: int, client: int) -> Metrics:
        optimizer.state.clear()  # a client keeps no momentum from the one before it
        ids = clients[client]
        steps = local_steps(federation, len(ids), config.train.batch_size)
        return setup.train_on(
            ids,
            steps,
            optimizer,
            entries,
            config.train,
            rng=generator(config.run.seed, "batches", number, client),
            learning_rate=lambda _: rate(number - 1),
            where=f"round {number}, client {client}",
            watch=lambda batches: display.watch(batches, 1 / (steps * per_round)),
        )

    rounds = fedavg(
        setup.model,
        entries,
        update_client,
        clients.sizes,
        fraction=federation.client_fraction,
        rounds=federation.num_rounds,
        seed=config.run.seed,
        done=progress.done,
        first_contact_bytes=first_contact_bytes(setup, head_moves="head.weight" in entries.masks),
    )
    with (
        Session(config, paths, setup, progress, unit="round", fresh=not saved) as session,
        Display(console, "round", federation.num_rounds, progress.done) as display,
    ):
        session.follow(rounds, federation.num_rounds, rate, display)
        sent = {"down": round(progress.bytes_down / 1e6, 3), "up": round(progress.bytes_up / 1e6, 3)}
        return session.finish({"moving_parameters": len(entries), "megabytes_sent": sent})


def local_steps(federation: FederationOptions, examples: int, batch_size: int) -> int:
    """J: as given, or as many as ``local_epochs`` passes take."""
    if federation.local_epochs is None:
        return federation.local_steps
    return federation.local_epochs * steps_per_epoch(examples, batch_size)


def first_contact_bytes(setup: Setup, *, head_moves: bool) -> int:
    """What a client is sent once: the mask's bits, and a fitted head that does not move (the rest it has)."""
    mask = {} if setup.mask is None else setup.mask[0]
    bits = sum(-(-tensor.numel() // 8) for tensor in mask.values())
    head = sum(parameter.nbytes for parameter in setup.model.head.parameters())
    return bits + (0 if head_moves or setup.head in ("weights", "random") else head)
