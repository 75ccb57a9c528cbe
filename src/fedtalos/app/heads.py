"""Heads that are fitted before a run begins: in closed form from holders' sums, or by training on kept features."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import add
from typing import TypeVar, get_args

import torch
from rich.console import Console
from torch.optim import Optimizer

from fedtalos.app.config.schema import AlgorithmOptions, CentralizedConfig, FederatedConfig
from fedtalos.app.moving import optimizer_of
from fedtalos.app.run.display import Display
from fedtalos.app.run.session import Progress
from fedtalos.app.setup import Setup
from fedtalos.models.head_file import set_head
from fedtalos.models.heads import ClosedForm, fit_head, head_sums
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients, Ids
from fedtalos.training.federated.fedavg import Round
from fedtalos.training.loop import TrainingError
from fedtalos.training.masked_parameters import Entries

ConfigT = TypeVar("ConfigT", CentralizedConfig, FederatedConfig)
RoundsOf = Callable[[ConfigT, Entries, Optimizer, Display], Iterator[Round]]
"""The rounds, or epochs, of a config: what moves in them, by which optimiser, and what shows them."""


def closed_form(head: str) -> ClosedForm | None:
    """That kind of head, if it is one that sums give."""
    return next((kind for kind in get_args(ClosedForm) if kind == head), None)


def fit_from_sums(kind: ClosedForm, setup: Setup, split: str, holders: Clients | Sequence[Ids]) -> int:
    """Put the head of all holders' sums on the model, tuned on validation images; returns the bytes of all sums.

    ``holders``: each one's images of the split.
    """
    classes = len(setup.dataset.classes)
    total = reduce(add, (head_sums(kind, *setup.features(split, ids), classes) for ids in holders))
    set_head(setup.model, *fit_head(kind, total, *setup.features("val")))
    return len(holders) * total.wire_bytes


def fit_head_first(
    config: ConfigT,
    setup: Setup,
    entries: Entries,
    holders: Clients | Sequence[Ids],
    rounds_of: RoundsOf[ConfigT],
    progress: Progress,
    console: Console,
) -> None:
    """Fit the head that is to be there before ``entries`` move, if any is; what it costs goes to ``progress``."""
    start = time.perf_counter()
    if setup.head == "linear":
        _train_linear(config, setup, rounds_of, progress, console)
    elif kind := closed_form(setup.head):
        console.print(f"fitting the {kind} head", highlight=False)
        sent = fit_from_sums(kind, setup, "train", holders)
        progress.bytes_up += sent if isinstance(config, FederatedConfig) else 0
    setup.let_move(entries)
    progress.seconds += time.perf_counter() - start


def _train_linear(
    config: ConfigT, setup: Setup, rounds_of: RoundsOf[ConfigT], progress: Progress, console: Console
) -> None:
    """A linear probe: the head alone learns from zeros, by SGD on plain images, with draws of its own."""
    config = linear_config(config)
    head = dict(setup.model.head.named_parameters(prefix="head"))
    with torch.no_grad():
        torch._foreach_zero_(list(head.values()))
    entries = Entries({name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in head.items()})
    setup.let_move(entries)
    optimizer = optimizer_of(config.train, head, entries)
    unit = "head round" if isinstance(config, FederatedConfig) else "head epoch"
    assert config.train.head_rounds is not None
    try:
        with Display(console, unit, config.train.head_rounds) as display:
            for round_ in rounds_of(config, entries, optimizer, display):
                progress.bytes_down += round_.bytes_down
                progress.bytes_up += round_.bytes_up
                progress.images += round_.train.examples
                display.finished(round_.number, round_.train, None)
    except TrainingError as error:
        raise TrainingError(f"fitting the linear head, whose rate is --head_learning_rate: {error}") from error


def linear_config(config: ConfigT) -> ConfigT:
    """The run's config, as a linear head is trained by it.

    By SGD, whatever moves the rest: AdamW's steps are as large for classes that a client lacks (docs/heads.md).
    """
    train, seed = config.train, int(generator(config.run.seed, "head").integers(2**31))
    changes = {"optimizer": "sgd", "learning_rate": train.head_learning_rate, "warmup": 0, "augmentation": "none"}
    alike = {
        "run": config.run.model_copy(update={"seed": seed}),
        "train": train.model_copy(update=changes),
    }
    if isinstance(config, CentralizedConfig):
        return config.model_copy(update={**alike, "num_epochs": train.head_rounds})
    rounds = {"num_rounds": train.head_rounds, "clients_at_once": 1}  # stacks would compute features anew
    federation = config.federation.model_copy(update=rounds)
    return config.model_copy(update={**alike, "federation": federation, "algorithm": AlgorithmOptions()})
