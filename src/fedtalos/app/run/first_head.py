"""The head that a run begins with: in closed form from holders' sums, or trained alone on kept features."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fedtalos.app.config.schema import CentralizedConfig, FederatedConfig
from fedtalos.app.federation import settled
from fedtalos.app.load import Loaded
from fedtalos.app.run.bars import bar
from fedtalos.app.run.display import Display, say
from fedtalos.app.run.folders import say_decisions
from fedtalos.app.run.session import Session
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.errors import TrainingError
from fedtalos.models.heads import closed_form
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Round
from fedtalos.training.head_fitting import fit_head
from fedtalos.training.local_training import Watch
from fedtalos.training.masked_parameters import MaskedParameters, head_mask

HeadRounds = Callable[[MaskedParameters, int, Watch], Iterator[tuple[Round, int, int]]]
"""(the head as what moves, seed, what watches batches) -> rounds that train it, with their bytes down and up."""


def fit_first_head(
    session: Session, moving: MaskedParameters, holders: Clients | Sequence[Ids], head_rounds: HeadRounds
) -> None:
    """Fit the head that is to be there before the run begins, if any is; its costs go to the session's progress."""
    loaded, progress, start = session.loaded, session.progress, time.perf_counter()
    if loaded.config.model.head == "linear":
        _train_linear(session, head_rounds)
    elif kind := closed_form(loaded.config.model.head):
        show_features(loaded, loaded.data.train, holders, f"fitting the {kind} head", session.console)
        sent = fit_head(
            loaded.model,
            loaded.data.train,
            kind,
            holders=holders,
            val=loaded.limited("val"),
            features=loaded.features,
        )
        say_decisions(session.paths, session.console)
        progress.bytes_up += sent if isinstance(loaded.config, FederatedConfig) else 0
    loaded.features.keep_only(moving.frozen_stages)
    progress.seconds += time.perf_counter() - start


def show_features(
    loaded: Loaded[Any], images: LabelledImages, holders: Iterable[Ids], title: str, console: Console
) -> None:
    """Compute the features that a head is fitted on, under a bar, in the very batches in which they are asked for."""
    say(console, title)
    size, val, model = loaded.config.data.eval_batch_size, loaded.limited("val"), loaded.model
    with bar(title, sum(map(len, holders)) + len(val), "images") as advance:
        for those, ids in [*((images, ids) for ids in holders), (val, np.arange(len(val)))]:
            for start in range(0, len(ids), size):
                part = ids[start : start + size]
                loaded.features.source(model, those, len(model.stages), [part])
                advance(len(part))


def _train_linear(session: Session, head_rounds: HeadRounds) -> None:
    """Train a linear probe: the head alone learns from zeros, by SGD on plain images, with draws of its own."""
    loaded, progress = session.loaded, session.progress
    config = loaded.config
    with torch.no_grad():
        torch._foreach_zero_(list(loaded.model.head.parameters()))
    head = MaskedParameters(loaded.model, head_mask(loaded.model), features=loaded.features)
    seed = int(generator(config.run.seed, "head").integers(2**31))
    unit = "head epoch" if isinstance(config, CentralizedConfig) else "head round"
    try:
        with Display(session.console, unit, settled(config.train.head_rounds)) as display:
            for round_, bytes_down, bytes_up in head_rounds(head, seed, display.watch):
                progress.count(bytes_down, bytes_up)
                progress.images += round_.train.examples
                display.finished(round_.number, round_.train, None)
    except TrainingError as error:
        raise TrainingError(f"fitting the linear head, whose rate is --head_learning_rate: {error}") from error
    loaded.model.head_source = "linear"


def everyone(count: int) -> list[Ids]:
    """One holder of all images."""
    return [np.arange(count)]
