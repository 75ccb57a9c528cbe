"""Train on all images in one place: the baseline."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.app.config.schema import CentralizedConfig
from fedtalos.app.heads import fit_head_first
from fedtalos.app.load import prepare
from fedtalos.app.moving import moving_entries, optimizer_for, schedule_for
from fedtalos.app.run.display import Display
from fedtalos.app.run.folders import RunPaths, open_run
from fedtalos.app.run.interruption import safe_point, until_asked
from fedtalos.app.run.session import Progress, Session, resume
from fedtalos.app.setup import Setup
from fedtalos.checkpoint import optimizer_tensors, restore_optimizer
from fedtalos.data.batches import steps_per_epoch
from fedtalos.metrics import Metrics
from fedtalos.randomness import generator
from fedtalos.training.federated.fedavg import Round
from fedtalos.training.masked_parameters import Entries


def run(config: CentralizedConfig, paths: RunPaths, console: Console) -> dict[str, Any]:
    """Train for ``num_epochs`` epochs; returns the summary."""
    config, setup = prepare(config)
    entries = moving_entries(setup, config.train)
    open_run(config, paths, setup.origin())
    optimizer = optimizer_for(setup, entries, config.train)
    progress, saved = resume(config, paths, setup)
    if saved:
        restore_optimizer(optimizer, saved)
    else:
        everything = [np.arange(len(setup.dataset.train))]
        fit_head_first(config, setup, entries, everything, partial(epochs, setup), progress, console)

    def state() -> dict[str, Tensor]:
        return optimizer_tensors(optimizer)

    with (
        Session(
            config,
            paths,
            setup,
            progress,
            unit="epoch",
            fresh=not saved,
            evaluate=setup.evaluate,
            extra_tensors=state,
        ) as session,
        Display(console, "epoch", config.num_epochs, progress.done) as display,
    ):
        rate = schedule_for(config.train, config.num_epochs)
        to_come = epochs(setup, config, entries, optimizer, display, progress)
        session.follow(to_come, config.num_epochs, rate, display)
        return session.finish({"moving_parameters": len(entries)})


def epochs(
    setup: Setup,
    config: CentralizedConfig,
    entries: Entries,
    optimizer: Optimizer,
    display: Display,
    progress: Progress | None = None,
) -> Iterator[Round]:
    """Train the epochs that are to come: each a round without clients."""
    progress = progress or Progress()
    images = len(setup.dataset.train)
    steps = steps_per_epoch(images, config.train.batch_size)
    rate = schedule_for(config.train, config.num_epochs)

    def train_epoch(number: int, first: int) -> Metrics:
        return setup.train_on(
            np.arange(images),
            steps,
            optimizer,
            entries,
            config.train,
            rng=generator(config.run.seed, "batches", number, 0),
            learning_rate=lambda step: rate(number - 1 + (first + step) / steps),
            where=f"epoch {number}",
            watch=lambda batches: display.watch(until_asked(batches), 1 / steps),
            first=first,
        )

    for number in range(progress.done + 1, config.num_epochs + 1):
        so_far = progress.epoch_so_far
        metrics = so_far + train_epoch(number, so_far.examples // config.train.batch_size)
        if metrics.examples < images:  # asked to stop within the epoch
            progress.epoch_so_far = metrics
            safe_point()
        progress.epoch_so_far = Metrics()
        yield Round(number, (), metrics, 0, 0)
