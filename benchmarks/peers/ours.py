"""fedtalos' own side: ``fedavg`` and ``train`` of the library, on the benchmark's task.

python benchmarks/peers/ours.py [settings] [--workers 2]
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
import tyro
from task import Meter, Settings, client_batches, client_size, freeze, make_model, moving, normalised
from torch import nn

from fedtalos.metrics import Metrics
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.federated.algorithms.drift import Exchange
from fedtalos.training.federated.fedavg import TrainClients, fedavg, one_by_one
from fedtalos.training.federated.processes import Leader, serve
from fedtalos.training.loop import freeze_all_but, make_optimizer, train
from fedtalos.training.masked_parameters import Entries


@dataclass(frozen=True)
class Options:
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    workers: int = 1
    """processes that share the clients"""
    mask: Path | None = None
    """a mask FILE: what moves, instead of ``moves``"""


def main(options: Options) -> None:
    meter, settings = Meter(), options.settings
    with TemporaryDirectory() as folder:
        others = [
            get_context("spawn").Process(target=follow, args=(options, rank, folder), daemon=True)
            for rank in range(1, options.workers)
        ]
        for process in others:
            process.start()
        model, entries, train_clients = prepare(options)
        if others:
            meet(options, 0, folder)
            train_clients = Leader(model, entries).spread(train_clients, Exchange())
        sizes = np.array([client_size(settings, client) for client in range(settings.clients)])
        fraction = settings.sampled / settings.clients
        meter.mark()
        for _ in fedavg(
            model, entries, train_clients, sizes, fraction=fraction, rounds=settings.rounds, seed=settings.seed
        ):
            meter.mark()
        meter.report(settings, model)
        for process in others:
            process.kill()


def follow(options: Options, rank: int, folder: str) -> None:
    model, entries, train_clients = prepare(options)
    meet(options, rank, folder)
    serve(model, entries, train_clients, no_evaluation, Exchange())


def no_evaluation(*_: object) -> list[Metrics]:
    return []


def meet(options: Options, rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=options.workers)


def prepare(options: Options) -> tuple[nn.Module, Entries, TrainClients]:
    settings = options.settings
    torch.set_num_threads(max(1, settings.threads // options.workers))
    model = make_model(settings)
    entries = moving_entries(model, options)
    freeze_all_but(model, entries)
    rule, rate = settings.optimizer, settings.learning_rate
    optimizer = make_optimizer(model, entries, rule=rule, learning_rate=rate, momentum=0.0, weight_decay=0.0)
    step: Callable[..., Metrics] = partial(
        train, model, learning_rate=lambda _: rate, clip_norm=None, precision=settings.precision
    )

    def update_client(_: int, client: int) -> Metrics:
        optimizer.state.clear()
        batches = ((normalised(pixels), labels) for pixels, labels in client_batches(settings, client))
        return step(batches, optimizer, entries)

    return model, entries, one_by_one(model, entries, update_client)


def moving_entries(model: nn.Module, options: Options) -> Entries:
    if options.mask is not None:
        return Entries(read_mask_file(options.mask)[0])
    if options.settings.moves == "qk":
        return eligible_entries(model, "qk")
    freeze(model, options.settings)
    return Entries({name: torch.ones(p.shape, dtype=torch.bool) for name, p in moving(model).items()})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
