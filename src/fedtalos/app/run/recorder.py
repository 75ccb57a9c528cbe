"""results/RUN/: config.yaml, metrics.csv, summary.yaml; and the same figures to a tracker where asked."""

import csv
import io
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Interval

from fedtalos._version import __version__
from fedtalos.app.run.trackers import Tracker
from fedtalos.errors import InputError, printable
from fedtalos.facts import MOST_TABLE, read_file, table_of, table_schema
from fedtalos.files import naming, opened, write_atomic
from fedtalos.metrics import Metrics

LARGEST = 1e18
"""Largest number in it; axes of figures fail beyond."""
COLUMNS = ("split", "loss", "accuracy", "examples", "learning_rate", "bytes_down", "bytes_up", "seconds")


def made_by(device: str) -> dict[str, Any]:
    """Facts about where a result comes from: versions, machine, commit, command and time."""
    return {
        "fedtalos": __version__,
        "torch": version("torch"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "device": device,
        "commit": code_commit(),
        "command_line": " ".join(sys.argv),
        "folder": str(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def code_commit() -> str | None:
    """The git commit of the code, with a + where files differ from it; None outside a checkout. Git is asked once."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as YAML, in its own order."""
    write_atomic(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line per row, under the first row's keys; a spreadsheet runs none of the cells."""
    write_lines(path, [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)])


def write_lines(path: Path, lines: Iterable[Sequence[object]]) -> None:
    """Write the lines of a table as CSV, the heading first; a spreadsheet runs none of the cells."""
    write_atomic(path, table_text(lines))


def table_text(lines: Iterable[Sequence[object]]) -> str:
    """Write the lines of a table as CSV into a text; a spreadsheet runs none of the cells."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([inert(cell) for cell in line] for line in lines)
    return text.getvalue()


def inert(cell: object) -> object:
    """Put a quote before text that a spreadsheet would take for a formula, and spell out control characters.

    >>> inert("=2+3"), inert("-0.5")
    ("'=2+3", '-0.5')
    """
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return text


Cell = Annotated[float, Interval(ge=-LARGEST, le=LARGEST)] | Literal["", "nan"]
"""A number, or nothing where it is not known."""


@table_schema
@dataclass(frozen=True)
class MetricsLine:
    """A row of metrics.csv: the columns that are read again."""

    step: Annotated[int, Interval(ge=0, lt=int(LARGEST))]
    split: Literal["train", "val", "test"]
    loss: Cell
    accuracy: Cell
    bytes_down: Cell
    bytes_up: Cell
    examples: Annotated[int, Interval(ge=0, lt=int(LARGEST))] | Literal[""] = ""


def cell(number: float) -> str:
    """Write a number for a table, nothing where it is not known.

    >>> cell(0.5), cell(math.nan)
    ('0.500000', '')
    """
    return "" if math.isnan(number) else f"{number:.6f}"


def known(cell: float | str) -> float:
    """Give a cell's number, nan where it is not known.

    >>> known(0.5), known("")
    (0.5, nan)
    """
    return math.nan if isinstance(cell, str) else cell


class Recorder:
    """Writes one run's rows as they come; ``step_name`` ("round" or "epoch") is the first column's name."""

    def __init__(
        self, folder: Path, step_name: str, *, keep_to: Mapping[str, int] | None = None, seconds: float = 0.0
    ) -> None:
        """Go on with a killed run's rows, of each split up to step ``keep_to``; ``seconds`` were spent before."""
        self.folder = folder
        self._path = folder / "metrics.csv"
        self._start = time.perf_counter() - seconds
        self._trackers: list[Tracker] = []
        rows = [[step_name, *COLUMNS]]
        if keep_to is not None:
            rows += [row for row in _whole_rows(self._path, rows[0]) if int(row[0]) <= keep_to.get(row[1], -1)]
        self._kept: list[list[Any]] | None = rows  # written with the first row: until then the run may be refused

    def track(self, tracker: Tracker) -> None:
        """Send every row to ``tracker`` too."""
        self._trackers.append(tracker)

    @property
    def seconds(self) -> float:
        """Seconds since the run started, earlier parts of a resumed run included."""
        return time.perf_counter() - self._start

    def record(
        self,
        step: int,
        split: str,
        metrics: Metrics,
        *,
        learning_rate: float | None = None,
        bytes_down: int = 0,
        bytes_up: int = 0,
    ) -> None:
        """Add one row; bytes are totals since the run started."""
        figures = [f"{metrics.loss:.6f}", f"{metrics.accuracy:.6f}", metrics.examples]
        rate = "" if learning_rate is None else f"{learning_rate:.6g}"
        row = [step, split, *figures, rate, bytes_down, bytes_up, f"{self.seconds:.2f}"]
        if self._kept is not None:
            write_atomic(self._path, table_text(self._kept))
            self._kept = None
        with naming(self._path), opened(self._path, "ab") as file:
            file.write(table_text([row]).encode())
            file.flush()
            os.fsync(file.fileno())
        logged = {f"{split}/loss": metrics.loss, f"{split}/accuracy": metrics.accuracy, "seconds": self.seconds}
        logged |= {} if learning_rate is None else {"learning_rate": learning_rate}
        logged |= {"bytes_down": bytes_down, "bytes_up": bytes_up} if bytes_down else {}
        for tracker in self._trackers:
            tracker.log(step, logged)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _whole_rows(path: Path, header: list[str]) -> list[list[str]]:
    """Data rows; a last one that was not written to its end is left out.

    Raises InputError where the table is not what this version writes.
    """
    content = read_file(path, str(path), most=MOST_TABLE) if path.exists() else b""
    content = content[: content.rfind(b"\n") + 1]
    if not content:
        return []
    # Read by the schema first: then there are not too many rows to keep.
    columns, lines = table_of(MetricsLine, content, path, first="step", advice="start a run of another name")
    rows = csv.reader(io.StringIO(content.decode()))
    kept = [row for row in islice(rows, len(lines) + 1) if len(row) == len(header)][1:]
    if columns != header or len(kept) != len(lines):
        raise InputError(f"{path}: broken, or of another version; start a run of another name")
    return kept
