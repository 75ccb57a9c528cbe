"""Progress of a run: what every checkpoint says of it, so that a resumed run goes on from there."""

from collections.abc import Mapping
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

    def count(self, down: int, up: int) -> None:
        """Count bytes sent."""
        self.bytes_down += down
        self.bytes_up += up

    def summary(
        self, unit: str, last: Metrics, best: Metrics, seconds: float, joules: Mapping[str, float]
    ) -> dict[str, Any]:
        """Figures of any run for its summary: the test's, of the last and the best model, and what it cost."""
        energy = {"energy_wh": {part: round(took / 3600, 3) for part, took in joules.items()}} if joules else {}
        return {
            f"{unit}s": self.done,
            "val_accuracy": {"last": _share(self.val_accuracy), "best": _share(self.best_accuracy)},
            "test_accuracy": {"last": _share(last.accuracy), "best_on_val": _share(best.accuracy)},
            "test_loss": {"last": _share(last.loss), "best_on_val": _share(best.loss)},
            f"best_{unit}": self.best,
            "images_trained_on": self.images,
            "seconds": round(seconds, 2),
            "evaluation_share": _share(self.evaluation_seconds / seconds),
            **energy,
        }

    def figures(self, moving: int) -> dict[str, Any]:
        """Figures of a federated run for its summary, beside accuracy; ``moving`` parameters move."""
        sent = {"down": round(self.bytes_down / 1e6, 3), "up": round(self.bytes_up / 1e6, 3)}
        lost = {"clients_left_out": self.left_out} if self.left_out else {}
        return {"moving_parameters": moving, "megabytes_sent": sent, **lost}


@open_schema
@dataclass(frozen=True)
class Saved:
    """Facts of a checkpoint about its run."""

    progress: Progress
    options: Annotated[dict[Word, Any], MaxLen(1000)]


def _share(value: float) -> float:
    return round(value, 6)
