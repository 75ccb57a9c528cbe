"""Progress of a run: what every checkpoint says of it, so that a resumed run goes on from there."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Interval, MaxLen

from fedtalos.facts import Count, Word, open_schema, schema
from fedtalos.metrics import Metrics

Measured = Annotated[float, Interval(ge=-1, le=1)]
"""A share, or -1 where it was not measured."""


@schema
@dataclass
class Progress:
    """Progress of a run; saved in every checkpoint, so that a resumed run goes on from there."""

    done: Count = 0
    best: Count = 0
    best_accuracy: Measured = -1.0
    val_accuracy: Measured = -1.0
    start_accuracy: Measured = -1.0
    """On validation, before anything moved; -1 where it was not measured."""
    bytes_down: Count = 0
    bytes_up: Count = 0
    images: Count = 0
    seconds: Annotated[float, Interval(ge=0, le=1e12)] = 0.0
    evaluation_seconds: Annotated[float, Interval(ge=0, le=1e12)] = 0.0
    validated: Annotated[int, Interval(ge=-1, le=2**62)] = -1
    stale: Count = 0
    """Count of validations since the best one."""
    epoch_so_far: Metrics = field(default_factory=Metrics)
    """Figures of an epoch within which the run was stopped."""
    left_out: Annotated[dict[Word, Count], MaxLen(1000)] = field(default_factory=dict)
    """Count of sampled clients that did not count, by why."""


@open_schema
@dataclass(frozen=True)
class Saved:
    """Facts of a checkpoint about its run."""

    progress: Progress
    options: Annotated[dict[Word, Any], MaxLen(1000)]
