"""Train on all images in one place: the baseline."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from fedtalos.checkpoint import optimizer_tensors, restore_optimizer
from fedtalos.config import CentralizedConfig
from fedtalos.data.batches import steps_per_epoch
from fedtalos.display import Display
from fedtalos.experiments.moving import moving_entries, optimizer_for, schedule_for
from fedtalos.experiments.preparation import prepare
from fedtalos.experiments.runs import RunPaths, open_run
from fedtalos.experiments.session import Session, resume
from fedtalos.randomness import generator
from fedtalos.training.fedavg import Round


def run(config: CentralizedConfig, paths: RunPaths, console: Console) -> dict[str, Any]:
    """Train for ``num_epochs`` epochs; returns the summary."""
    config, setup = prepare(config)
    entries = moving_entries(setup, config.train)
    open_run(config, paths, setup.origin())
    images = setup.dataset.train
    optimizer = optimizer_for(setup, entries, config.train)
    rate = schedule_for(config.train, config.num_epochs)
    steps = steps_per_epoch(len(images), config.train.batch_size)
    progress, saved = resume(paths, setup)
    if saved:
        restore_optimizer(optimizer, saved)
    elif setup.head == "ridge":
        setup.fit_head(setup.head_sums(images))

    def within_epoch(number: int, step: int) -> float:
        return rate(number - 1 + step / steps)

    def epochs(done: int) -> Iterator[Round]:
        for number in range(done + 1, config.num_epochs + 1):
            metrics = setup.train_on(
                np.arange(len(images)),
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
        session.follow(epochs(progress.done), config.num_epochs, rate, display)
        return session.finish({"moving_parameters": len(entries)})
