"""Train with federated averaging over clients that keep their images."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rich.console import Console
from torch.optim import Optimizer

from fedtalos.app.absence import absence_for
from fedtalos.app.aggregation import aggregation_for, privacy, sent_updates
from fedtalos.app.algorithms import adjust_for, local_steps, server_side
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.grouping import grouped, settle_clients_at_once
from fedtalos.app.heads import fit_head_first
from fedtalos.app.load import prepare
from fedtalos.app.moving import moving_entries, optimizer_for, schedule_for
from fedtalos.app.personal import evaluate_clients
from fedtalos.app.run.display import Display
from fedtalos.app.run.folders import RunPaths, open_run
from fedtalos.app.run.interruption import with_safe_points
from fedtalos.app.run.launch import Others, agreed, others
from fedtalos.app.run.session import Session, resume
from fedtalos.app.run.split_file import split, write_split
from fedtalos.app.setup import Setup
from fedtalos.devices import choose_device
from fedtalos.metrics import Metrics
from fedtalos.randomness import generator
from fedtalos.training.federated.algorithms.drift import Exchange
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Round, TrainClients, clients_per_round, fedavg, one_by_one
from fedtalos.training.federated.processes import Leader, WorkerLostError, serve
from fedtalos.training.loop import Batches
from fedtalos.training.masked_parameters import Entries

Watch = Callable[[Batches, float], Batches]
"""Passes batches on; each is that share of a round."""


def run(config: FederatedConfig, paths: RunPaths, console: Console) -> dict[str, Any]:
    """Train for ``num_rounds`` rounds, leading other processes where asked; returns the summary."""
    with others(config) as beside:
        try:
            return _lead(config, paths, console, beside)
        except WorkerLostError as error:
            raise WorkerLostError(f"{error}; --resume --run_name {paths.name} goes on from what is saved") from error


def _lead(config: FederatedConfig, paths: RunPaths, console: Console, beside: Others) -> dict[str, Any]:
    spent = privacy(config, config.federation.num_rounds)  # first, for it may want a library
    config, setup = prepare(config)
    federation = config.federation
    clients = split(setup, config.split, config.run.seed)
    entries = moving_entries(setup, config.train)
    optimizer = optimizer_for(setup, entries, config.train)
    config = settle_clients_at_once(config, setup, entries, optimizer, clients, console)
    open_run(config, paths, setup.origin())
    write_split(paths, setup, clients)
    progress, saved = resume(config, paths, setup)
    if not saved:
        head_rounds = partial(rounds_of_the_head, setup, clients)
        fit_head_first(config, setup, entries, clients, head_rounds, progress, console)

    display = Display(console, "round", federation.num_rounds, progress.done)
    exchange = Exchange()
    server = server_side(config, clients.sizes, exchange, saved, setup.device)
    train_clients = local_training(config, setup, clients, entries, optimizer, exchange, display.watch)
    evaluate = setup.evaluate
    if beside.size > 1:
        beside.meet(setup.device)
        agreed(config)
        leader = Leader(setup.model, entries)
        train_clients = leader.spread(train_clients, exchange)
        evaluate = partial(evaluate_shared, leader, setup)
    rounds = fedavg(
        setup.model,
        entries,
        sent_updates(config, server.controlled(entries, train_clients)),
        server.weights,
        fraction=federation.client_fraction,
        rounds=federation.num_rounds,
        seed=config.run.seed,
        done=progress.done,
        first_contact_bytes=first_contact_bytes(setup, head_moves="head.weight" in entries.masks),
        aggregation=aggregation_for(config, setup.model, entries),
        server=server.rule,
        vectors_sent=server.vectors_sent,
        absent=absence_for(config, clients, partial(steps_of, config, clients)),
        on_bad_client=config.failures.on_bad_client,
    )
    with (
        Session(
            config,
            paths,
            setup,
            progress,
            unit="round",
            fresh=not saved,
            evaluate=evaluate,
            extra_tensors=server.tensors,
        ) as session,
        display,
    ):
        session.follow(rounds, federation.num_rounds, schedule_for(config.train, federation.num_rounds), display)
        sent = {"down": round(progress.bytes_down / 1e6, 3), "up": round(progress.bytes_up / 1e6, 3)}
        by_client = evaluate_clients(config, paths, setup, clients, entries, optimizer, console)
        lost = {"clients_left_out": progress.left_out} if progress.left_out else {}
        return session.finish({"moving_parameters": len(entries), "megabytes_sent": sent, **lost, **spent, **by_client})


def follow(config: FederatedConfig) -> None:
    """What a process beside the leader does: train the clients, and evaluate the batches, that it is given."""
    with others(config) as beside:
        beside.meet(choose_device(config.run.device))
        config, setup = prepare(agreed(config))  # after the leader's: data and weights are downloaded once
        clients = split(setup, config.split, config.run.seed)
        entries = moving_entries(setup, config.train)
        optimizer = optimizer_for(setup, entries, config.train)
        exchange = Exchange()
        train_clients = local_training(config, setup, clients, entries, optimizer, exchange, lambda batches, _: batches)
        serve(setup.model, entries, train_clients, setup.evaluate_part, exchange)


def rounds_of_the_head(
    setup: Setup, clients: Clients, config: FederatedConfig, entries: Entries, optimizer: Optimizer, display: Display
) -> Iterator[Round]:
    """FedAvg of a linear head, by this process alone: on kept features a round takes milliseconds."""
    return fedavg(
        setup.model,
        entries,
        local_training(config, setup, clients, entries, optimizer, Exchange(), display.watch),
        clients.sizes,
        fraction=config.federation.client_fraction,
        rounds=config.federation.num_rounds,
        seed=config.run.seed,
    )


def evaluate_shared(leader: Leader, setup: Setup, split: str) -> Metrics:
    """The metrics of a split, by all processes; by this one alone where one is lost, which ends the next round."""
    try:
        return leader.evaluate(setup.evaluate_part, split)
    except WorkerLostError:
        return setup.evaluate(split)


def local_training(
    config: FederatedConfig,
    setup: Setup,
    clients: Clients,
    entries: Entries,
    optimizer: Optimizer,
    exchange: Exchange,
    watch: Watch,
) -> TrainClients:
    """How clients train: with a fresh optimiser each, on batches drawn for that round and client."""
    rate = schedule_for(config.train, config.federation.num_rounds)
    per_round = clients_per_round(len(clients), config.federation.client_fraction)
    steps = partial(steps_of, config, clients)

    def watch_work(batches: Batches, share: float) -> Batches:
        return watch(with_safe_points(batches), share / per_round)

    def update_client(number: int, client: int) -> Metrics:
        optimizer.state.clear()  # a client keeps no momentum from the one before it
        return setup.train_on(
            clients[client],
            steps(client),
            optimizer,
            entries,
            config.train,
            rng=generator(config.run.seed, "batches", number, client),
            learning_rate=lambda _: rate(number - 1),
            watch=lambda batches: watch_work(batches, 1 / steps(client)),
            adjust=adjust_for(config.algorithm, setup.model, entries, exchange, client, steps(client)),
        )

    alone = one_by_one(setup.model, entries, update_client)
    return grouped(alone, config, setup, entries, clients, steps, rate, watch_work)


def steps_of(config: FederatedConfig, clients: Clients, client: int) -> int:
    """J, of that client."""
    return local_steps(config.federation, len(clients[client]), config.train.batch_size)


def first_contact_bytes(setup: Setup, *, head_moves: bool) -> int:
    """What a client is sent once: the mask's bits, and a fitted head that does not move (the rest it has)."""
    mask = {} if setup.mask is None else setup.mask[0]
    bits = sum(-(-tensor.numel() // 8) for tensor in mask.values())
    head = sum(parameter.nbytes for parameter in setup.model.head.parameters())
    return bits + (0 if head_moves or setup.head in ("weights", "random") else head)
