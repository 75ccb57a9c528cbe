"""Records that runs leave behind, read for figures: metrics by round or epoch, and an edit's report."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtalos.app.config.files import read_yaml
from fedtalos.app.figures.style import drawable
from fedtalos.errors import InputError, shown
from fedtalos.training.editing.describe import DensityRow

LARGEST = 1e18
"""Largest number that is drawn; the axes fail beyond it."""

_STEP_NAMES = ("round", "epoch")
_COLUMNS = ("split", "loss", "accuracy", "bytes_down", "bytes_up")


@dataclass(frozen=True)
class Row:
    """One line of a run's metrics: accuracy 0 to 1, megabytes sent both ways since the start; nan where not known."""

    step: int
    split: str
    loss: float
    accuracy: float
    megabytes: float


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
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="(missing)")  # a torn line is an error, an empty cell is not
            header = reader.fieldnames or []
            step_name = header[0] if header else ""
            if step_name not in _STEP_NAMES or not set(_COLUMNS) <= set(header):
                raise InputError(
                    f"{path}: expected the columns round or epoch, {', '.join(_COLUMNS)}, "
                    f"got {', '.join(header) or 'an empty file'}; make the run anew"
                )
            rows = [_row(path, reader.line_num, step_name, record) for record in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file ({error}); make the run anew") from error
    if not any(math.isfinite(row.accuracy) for row in rows):
        raise InputError(f"{path}: holds no accuracy yet; wait for the run's first evaluation or make the run anew")
    return History(drawable(run_dir.resolve().name), step_name, rows)


def check_one_data_set(run_dirs: Sequence[Path]) -> None:
    """Raise InputError where runs are of different images, by their config.yaml; a run without one may be of any.

    Folders of images are the same where their paths are, or the images themselves.
    """
    known = [(run_dir, found) for run_dir in run_dirs if (found := _data_set(run_dir)) is not None]
    for run_dir, (name, same) in known[1:]:
        first_dir, (first, same_first) = known[0]
        if not same & same_first:
            raise InputError(
                f"runs to compare: {first_dir.resolve().name} is of {first} and {run_dir.resolve().name} of {name}, "
                "whose accuracies are not to be read on one axis; draw the runs of each data set by themselves"
            )


def _data_set(run_dir: Path) -> tuple[str, set[str]] | None:
    """The data set of a run in words, and what tells it: one of these suffices."""
    path = run_dir / "config.yaml"
    config = read_yaml(path) if path.is_file() else {}
    name, made_by = config.get("dataset"), config.get("made_by")
    if not isinstance(name, str):
        return None
    if name != "folder":
        return name, {name}
    record: dict[str, Any] = made_by if isinstance(made_by, dict) else {}
    place, inputs = Path(str(record.get("folder", ""))) / str(config.get("data_dir")), record.get("inputs")
    return f"the folder {place}", {str(place), *([str(inputs.get("data"))] if isinstance(inputs, dict) else [])}


def _row(path: Path, line: int, step_name: str, record: Mapping[str, str]) -> Row:
    try:
        numbers = {name: float(record[name] or "nan") for name in _COLUMNS if name != "split"}
        megabytes = (numbers["bytes_down"] + numbers["bytes_up"]) / 1e6
        step = int(record[step_name])
        if not 0 <= step < LARGEST or any(abs(number) > LARGEST for number in numbers.values() if number < math.inf):
            raise ValueError("more than can be drawn")
        return Row(step, record["split"], numbers["loss"], numbers["accuracy"], megabytes)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}, line {line}: expected numbers, got {shown(dict(record))}; make the run anew"
        ) from error


def read_report(run_dir: Path) -> dict[int, list[DensityRow]]:
    """Read an edit's report.csv: the density rows of each iteration. InputError where it cannot be read."""
    path = run_dir / "report.csv"
    iterations: dict[int, list[DensityRow]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                row = DensityRow(int(line["block"]), line["kind"], int(line["active"]), int(line["entries"]))
                number = int(line["iteration"])
                if not (0 <= row.active <= row.entries < LARGEST and row.entries and 0 <= number < LARGEST):
                    raise ValueError("more than can be drawn")
                iterations.setdefault(number, []).append(row)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as an edit's report; name a run of `fedtalos editing`") from error
    return iterations
