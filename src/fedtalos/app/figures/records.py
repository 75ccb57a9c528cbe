"""Records that runs leave behind, read for figures: metrics by round or epoch, and an edit's report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtalos.app.figures.style import drawable
from fedtalos.app.run.books import ReportRow
from fedtalos.app.run.recorder import MetricsLine, known
from fedtalos.errors import InputError, shown
from fedtalos.facts import read_table
from fedtalos.training.editing.describe import DensityRow

_STEP_NAMES = ("round", "epoch")
MOST_ITERATIONS = 1000
"""Iterations of an edit that are drawn."""


@dataclass(frozen=True)
class Row:
    """One line of a run's metrics: accuracy 0 to 1, megabytes sent both ways since the start; nan where not known."""

    step: int
    split: str
    loss: float
    accuracy: float
    megabytes: float
    examples: int = 0
    """Images that the accuracy is of; 0 where not known."""


FEW = 3
"""Points that a table says as well as a figure: more are drawn."""

Quantity = Callable[[Row], float]


@dataclass(frozen=True)
class History:
    """A run's metrics by ``step_name`` (round or epoch)."""

    name: str
    step_name: str
    rows: Sequence[Row]

    def series(self, split: str, x: Quantity, y: Quantity) -> tuple[list[float], list[float]]:
        """Collect x and y of one split's rows, in order, without rows that lack either number."""
        pairs = [(x(row), y(row)) for row in self.rows if row.split == split]
        known = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
        return [a for a, _ in known], [b for _, b in known]

    @property
    def points(self) -> int:
        """Most accuracies that it has of one split."""
        known = [row.split for row in self.rows if math.isfinite(row.accuracy)]
        return max(map(known.count, set(known)), default=0)

    @property
    def sent(self) -> bool:
        """True where an accuracy was reached after bytes had been sent."""
        return any(row.split != "train" and row.megabytes > 0 and not math.isnan(row.accuracy) for row in self.rows)


def read_history(run_dir: Path) -> History:
    """Read a run's metrics.csv. InputError where it is missing, broken, or holds no accuracy yet."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        raise InputError(
            f"run {run_dir}: expected a run's folder, found no metrics.csv in it; "
            "give a folder under results/ that `fedtalos centralized` or `fedtalos federated` made"
        )
    columns, lines = read_table(MetricsLine, path, first="step")
    if (step_name := columns[0]) not in _STEP_NAMES:
        raise InputError(
            f"{path}: expected the columns round or epoch, split ..., got {shown(step_name)} first; make the run anew"
        )
    rows = [_row(line) for line in lines]
    if not any(math.isfinite(row.accuracy) for row in rows):
        raise InputError(f"{path}: holds no accuracy yet; wait for the run's first evaluation or make the run anew")
    return History(drawable(run_dir.resolve().name), step_name, rows)


def _row(line: MetricsLine) -> Row:
    loss, accuracy, down, up = map(known, (line.loss, line.accuracy, line.bytes_down, line.bytes_up))
    return Row(line.step, line.split, loss, accuracy, (down + up) / 1e6, line.examples or 0)


def read_report(run_dir: Path) -> dict[int, list[DensityRow]]:
    """Read an edit's report.csv: the density rows of each iteration. InputError where it cannot be read."""
    path = run_dir / "report.csv"
    _, lines = read_table(ReportRow, path, advice="name a run of `fedtalos editing`")
    iterations: dict[int, list[DensityRow]] = {}
    for line in lines:
        if line.active > line.entries:
            raise InputError(f"{path}: more of iteration {line.iteration} may move than there is; make the run anew")
        row = DensityRow(line.block, line.kind, line.active, line.entries)
        iterations.setdefault(line.iteration, []).append(row)
    if len(iterations) > MOST_ITERATIONS:
        raise InputError(
            f"{path}: of {len(iterations)} iterations, and {MOST_ITERATIONS} can be drawn; name another run"
        )
    return iterations
