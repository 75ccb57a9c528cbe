"""Evaluation of a run's splits: validation reads kept features, the test split, which is read once, does not."""

from collections.abc import Callable
from typing import Any

from fedtalos.app.load import Loaded
from fedtalos.app.run.interruption import with_safe_points
from fedtalos.metrics import Metrics
from fedtalos.training.evaluation import evaluate_batches
from fedtalos.training.loop import Batches
from fedtalos.training.masked_parameters import MaskedParameters


def evaluate_part(
    loaded: Loaded[Any],
    moving: MaskedParameters,
    split: str,
    first: int,
    every: int,
    watch: Callable[[Batches], Batches] = with_safe_points,
) -> list[Metrics]:
    """Metrics of batches first, first + every, ... of a split's first ``eval_limit`` images."""
    return evaluate_batches(
        moving.model if split == "test" else moving,
        loaded.limited(split),
        batch_size=loaded.config.data.eval_batch_size,
        precision=loaded.config.run.arithmetic,
        compile=loaded.config.run.steps,
        watch=watch,
        first=first,
        every=every,
    )


def evaluate_split(
    loaded: Loaded[Any],
    moving: MaskedParameters,
    split: str,
    watch: Callable[[Batches], Batches] = with_safe_points,
) -> Metrics:
    """Loss and accuracy on a split."""
    return sum(evaluate_part(loaded, moving, split, 0, 1, watch), Metrics())
