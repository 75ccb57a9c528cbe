"""fedtalos' own side: ``fedavg`` and ``train`` of the library, on the benchmark's task.

python benchmarks/peers/ours.py [settings] [--workers 2]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
import tyro
from task import Meter, Settings, all_images, client_batches, client_size, freeze, make_model, moving, normalised

from fedtalos.data.images import LabelledImages
from fedtalos.metrics import Metrics
from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.entries import Mask, Values
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Lost, Update, Updates, fedavg
from fedtalos.training.federated.processes import in_processes, serve
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.loop import train
from fedtalos.training.masked_parameters import MaskedParameters


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
        work = prepare(options)
        engine = partial(in_task_order, settings=settings)
        if others:
            meet(options, 0, folder)
            engine = partial(in_processes, within=engine)
        rounds = fedavg(
            work,
            clients_of(settings),
            local=local_training(settings),
            rounds=settings.rounds,
            fraction=settings.sampled / settings.clients,
            seed=settings.seed,
            engine=engine,
        )
        meter.mark()
        for _ in rounds:
            meter.mark()
        meter.report(settings, work.model)
        for process in others:
            process.kill()


def follow(options: Options, rank: int, folder: str) -> None:
    work, settings = prepare(options), options.settings
    meet(options, rank, folder)
    serve(
        work,
        clients_of(settings),
        local_training(settings),
        settings.seed,
        FedAvg(),
        no_evaluation,
        within=partial(in_task_order, settings=settings),
    )


def no_evaluation(*_: object) -> list[Metrics]:
    return []


def meet(options: Options, rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=options.workers)


def prepare(options: Options) -> MaskedParameters:
    torch.set_num_threads(max(1, options.settings.threads // options.workers))
    model = make_model(options.settings)
    return MaskedParameters(model, what_moves(model, options))


def what_moves(model: VisionTransformer, options: Options) -> Mask:
    if options.mask is not None:
        return read_mask_file(options.mask)[0]
    if options.settings.moves == "qk":
        return eligible_entries(model, "qk").masks
    freeze(model, options.settings)
    return {name: torch.ones(p.shape, dtype=torch.bool) for name, p in moving(model).items()}


def clients_of(settings: Settings) -> Clients:
    """Every client's size; which images it has is the task's to say."""
    sizes = [client_size(settings, client) for client in range(settings.clients)]
    images = LabelledImages(*all_images(settings))
    return Clients(images, np.arange(sum(sizes)) % len(images), np.cumsum([0, *sizes]))


def local_training(settings: Settings) -> LocalTraining:
    return LocalTraining(
        steps=max(1, settings.local_steps),
        batch_size=settings.batch_size,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        momentum=0.0,
        weight_decay=0.0,
        clip_norm=None,
        precision=settings.precision,
    )


def in_task_order(
    work: MaskedParameters,
    _clients: Clients,
    local: LocalTraining,
    _seed: int,
    _algorithm: FedAvg,
    *,
    settings: Settings,
) -> Updates:
    """`one_by_one` on the task's batches, which come in the same order in every round."""
    optimizer, rate = local.optimizer_for(work), local.rate(0)

    def updates(_number: int, chosen: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
        for client in chosen:
            work.load(theta)
            optimizer.state.clear()
            batches = ((normalised(pixels), labels) for pixels, labels in client_batches(settings, client))
            metrics = train(work, batches, optimizer, learning_rate=lambda _: rate, precision=local.precision)
            yield client, Update(work.rows, metrics)

    return updates


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
