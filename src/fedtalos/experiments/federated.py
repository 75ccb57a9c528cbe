"""Train with federated averaging over clients that keep their images."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.console import Console

from fedtalos.app.config.rounds import rounds_of
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.engine import with_engine
from fedtalos.app.federation import (
    algorithm_of,
    clients_of,
    engine_of,
    head_engine_of,
    head_training,
    local_training,
    privacy_spent,
    settled,
    transforms_of,
)
from fedtalos.app.load import Loaded, load
from fedtalos.app.moving import moving_parameters
from fedtalos.app.run.apart import Apart
from fedtalos.app.run.client_accuracy import evaluate_clients
from fedtalos.app.run.evaluation import evaluate_part, evaluate_split
from fedtalos.app.run.first_head import fit_first_head
from fedtalos.app.run.folders import begun
from fedtalos.app.run.holders import LocalHolders
from fedtalos.app.run.kept import Kept, clients_in, groups_of, units_of
from fedtalos.app.run.launch import Others, check_alone, others, rank
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.session import Evaluate, Session
from fedtalos.app.run.split_file import write_split
from fedtalos.devices import choose_device
from fedtalos.metrics import Metrics
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Engine, FedAvg, Round, fedavg
from fedtalos.training.federated.processes import (
    WorkerLostError,
    evaluate_in_processes,
    in_processes,
    send_model,
    serve,
)
from fedtalos.training.federated.traffic import Traffic
from fedtalos.training.local_training import Watch, unwatched
from fedtalos.training.loop import Batches
from fedtalos.training.masked_parameters import MaskedParameters


def run(config: FederatedConfig, console: Console) -> None:
    """Train for ``num_rounds`` rounds, leading other processes where asked."""
    if config.apart.asked:
        check_alone("--tasks or --one_shot")
    if rank():
        follow(config)
        return
    with begun(config, console) as paths, others(config, paths) as beside:
        if config.apart.asked:
            run_apart(config, paths, console)
            return
        privacy_spent(config)  # may want a library: then that is said first
        loaded, clients, moving, algorithm = begin(config)
        config, local, total = loaded.config, local_training(loaded.config), config.federation.num_rounds
        spent = privacy_spent(config)  # of as many clients as there are: the data may name them
        with Session(loaded, paths, console, unit="round", total=total, rate=local.rate) as session:
            session.introduce(moving, clients, algorithm)
            session.keep_algorithm(algorithm, len(moving))
            write_split(paths.results, clients, loaded.data.classes)
            if session.fresh:
                fit_first_head(session, moving, clients, partial(rounds_of_the_head, loaded, clients))
            session.keep_start(moving)
            within = engine_of(config, session.watch)
            engine, evaluate = shared(beside, loaded, moving, within, session.evaluating)
            rounds = fedavg(
                moving,
                clients,
                local=local,
                rounds=total,
                fraction=config.federation.client_fraction,
                sampling=config.federation.client_sampling,
                seed=config.run.seed,
                algorithm=algorithm,
                through=transforms_of(config, clients, local),
                engine=engine,
                on_bad_client=config.failures.on_bad_client,
                done=session.done,
            )
            traffic = Traffic(moving, algorithm, len(clients), first_contact=first_contact_bytes(loaded, moving))
            federation = config.federation
            traffic.skip(session.done, federation.client_fraction, config.run.seed, federation.client_sampling)
            if session.due(session.done):
                session.validate(evaluate)
            for round_ in session.shown(rounds):
                session.record(round_, *traffic.count(round_))
                if session.due(round_.number):
                    session.validate(evaluate)
            by_client = evaluate_clients(loaded, paths, clients, moving, console)
            session.finish(evaluate, {**session.progress.figures(len(moving)), **spent, **by_client})


def run_apart(config: FederatedConfig, paths: RunPaths, console: Console) -> None:
    """Train tasks, or clients, apart from one start, and merge them once."""
    if not paths.started:
        Kept(paths).check_free()
    loaded, clients, moving, algorithm = begin(config)
    config, each = loaded.config, rounds_of(loaded.config).each
    holders, rate = LocalHolders(loaded, clients, moving), local_training(config).rate
    units = units_of(config, holders, groups_of(config, loaded.data))
    total, taking_part = each * len(units), clients.only(clients_in(units))
    with Session(loaded, paths, console, unit="round", total=total, rate=lambda done: rate(done % each)) as session:
        session.introduce(moving, clients)
        write_split(paths.results, clients, loaded.data.classes)
        apart = Apart(loaded, holders, moving, session)
        apart.begin(partial(rounds_of_the_head, loaded, taking_part))
        traffic = Traffic(moving, algorithm, len(clients), first_contact=first_contact_bytes(loaded, moving))
        evaluate = partial(evaluate_split, loaded, moving, watch=session.evaluating)
        merged = apart.run(evaluate, traffic)
        own = apart.own_vectors() if config.personal.client_evaluation else None
        by_client = evaluate_clients(loaded, paths, clients, moving, console, own)
        session.finish(evaluate, {**session.progress.figures(len(moving)), **merged, **by_client})


def begin(config: FederatedConfig) -> tuple[Loaded[FederatedConfig], Clients, MaskedParameters, FedAvg]:
    """Load what the run needs, and settle how clients train."""
    loaded = load(config)
    config = loaded.config
    clients = clients_of(loaded.data.train, config.split, config.run.seed, groups_of(config, loaded.data))
    moving, algorithm = moving_parameters(loaded), algorithm_of(config)
    return with_engine(loaded, moving, local_training(config)), clients, moving, algorithm


def shared(
    beside: Others,
    loaded: Loaded[FederatedConfig],
    moving: MaskedParameters,
    engine: Engine,
    watch: Callable[[Batches], Batches],
) -> tuple[Engine, Evaluate]:
    """Spread the engine and the evaluation of splits over the processes beside this one, where there are any."""
    if beside.size == 1:
        return engine, partial(evaluate_split, loaded, moving, watch=watch)
    beside.meet(loaded.device)
    send_model(moving)  # with the head that was fitted, or restored

    def evaluate(split: str) -> Metrics:
        try:
            return evaluate_in_processes(moving, partial(evaluate_part, loaded, moving), split)
        except WorkerLostError:  # which ends the next round
            return evaluate_split(loaded, moving, split)

    return partial(in_processes, within=engine), evaluate


def follow(config: FederatedConfig) -> None:
    """Train the clients, and evaluate the batches, that the leading process asks for."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with others(config) as beside:
        beside.meet(choose_device(config.run.device))
        loaded, clients, moving, algorithm = begin(config)  # after the leader's: data and weights are downloaded once
        serve(
            moving,
            clients,
            local_training(loaded.config),
            config.run.seed,
            algorithm,
            partial(evaluate_part, loaded, moving),
            within=engine_of(loaded.config, unwatched),
        )


def rounds_of_the_head(
    loaded: Loaded[FederatedConfig], clients: Clients, head: MaskedParameters, seed: int, watch: Watch
) -> Iterator[tuple[Round, int, int]]:
    """Train a linear head by FedAvg, in this process alone: on kept features a round takes milliseconds."""
    traffic, federation = Traffic(head, FedAvg(), len(clients)), loaded.config.federation
    for round_ in fedavg(
        head,
        clients,
        local=head_training(loaded.config),
        rounds=settled(loaded.config.train.head_rounds),
        fraction=federation.client_fraction,
        sampling=federation.client_sampling,
        seed=seed,
        engine=head_engine_of(loaded.config, watch),
    ):
        yield round_, *traffic.count(round_)


def first_contact_bytes(loaded: Loaded[FederatedConfig], moving: MaskedParameters) -> int:
    """Bytes that a client is sent once: the mask's bits, and a fitted head that does not move (the rest it has)."""
    mask = {} if loaded.mask is None else loaded.mask[0]
    bits = sum(-(-tensor.numel() // 8) for tensor in mask.values())
    has_it = "head.weight" in moving.parameters or loaded.config.model.head in ("weights", "random")
    return bits + (0 if has_it else sum(parameter.nbytes for parameter in loaded.model.head.parameters()))
