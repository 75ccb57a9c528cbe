"""Train on all images in one place: the baseline."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.checkpoint import optimizer_tensors, restore_optimizer
from fedtalos.config import CentralizedConfig
from fedtalos.data.batches import steps_per_epoch
from fedtalos.display import Display
from fedtalos.experiments.heads import fit_head_first
from fedtalos.experiments.moving import moving_entries, optimizer_for, schedule_for
from fedtalos.experiments.preparation import prepare
from fedtalos.experiments.runs import RunPaths, open_run
from fedtalos.experiments.session import Session, resume
from fedtalos.experiments.setup import Setup
from fedtalos.parameters import Entries
from fedtalos.randomness import generator
from fedtalos.training.fedavg import Round


def run(config: CentralizedConfig, paths: RunPaths, console: Console) -> dict[str, Any]:
    """Train for ``num_epochs`` epochs; returns the summary."""
    config, setup = prepare(config)
    entries = moving_entries(setup, config.train)
    open_run(config, paths, setup.inputs())
    optimizer = optimizer_for(setup, entries, config.train)
    progress, saved = resume(paths, setup)
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
        to_come = epochs(setup, config, entries, optimizer, display, done=progress.done)
        session.follow(to_come, config.num_epochs, rate, display)
        return session.finish({"moving_parameters": len(entries)})


def epochs(
    setup: Setup,
    config: CentralizedConfig,
    entries: Entries,
    optimizer: Optimizer,
    display: Display,
    done: int = 0,
) -> Iterator[Round]:
    """Train epochs done+1..num_epochs: each a round without clients."""
    images = len(setup.dataset.train)
    steps = steps_per_epoch(images, config.train.batch_size)
    rate = schedule_for(config.train, config.num_epochs)

    def within_epoch(number: int, step: int) -> float:
        return rate(number - 1 + step / steps)

    for number in range(done + 1, config.num_epochs + 1):
        metrics = setup.train_on(
            np.arange(images),
            steps,
            optimizer,
            entries,
            config.train,
            rng=generator(config.run.seed, "batches", number, 0),
            learning_rate=partial(within_epoch, number),
            where=f"epoch {number}",
            watch=lambda batches: display.watch(batches, 1 / steps),
        )
        yield Round(number, (), metrics, 0, 0)
