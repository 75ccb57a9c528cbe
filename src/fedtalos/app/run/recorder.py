"""results/RUN/: config.yaml, metrics.csv, summary.yaml; and the same figures to TensorBoard or wandb where asked."""

import csv
import importlib.util
import io
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import yaml

from fedtalos._version import __version__
from fedtalos.errors import InputError, install
from fedtalos.files import naming, write_atomic
from fedtalos.metrics import Metrics

WANDB_NAME = 128
"""Most characters of a name that wandb shows."""

COLUMNS = ("split", "loss", "accuracy", "examples", "learning_rate", "bytes_down", "bytes_up", "seconds")


class Tracker(Protocol):
    """A place that figures go to besides metrics.csv."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def require_tracker(name: str) -> None:
    """InputError where the tracker's library is not installed, or wandb knows no account and was not told offline."""
    if name == "none":
        return
    if importlib.util.find_spec(name) is None:
        raise InputError(f"--tracker {name}: not installed; {install(name)}")
    if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False):
            raise InputError("--tracker wandb: no account is set up; run `wandb login`, or set WANDB_MODE=offline")


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Logs to a run of wandb's: shown by the name of ours, known by an id of its own, which ``results`` keeps.

    A name may be that of another run in another folder, and may hold characters that an id may not.
    """

    def __init__(self, results: Path, config: Mapping[str, Any]) -> None:
        import wandb

        folder, name = results.parents[1], results.name
        try:
            self._run = wandb.init(  # makes folder/wandb
                project="fedtalos",
                name=name[:WANDB_NAME],
                id=wandb_id(results),
                dir=str(folder),
                config=dict(config),
                resume="allow",
            )
        except wandb.Error as error:
            raise InputError(f"--tracker wandb: {error}; see to it, or leave --tracker out and --resume") from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def wandb_id(results: Path) -> str:
    """The id by which wandb knows a run, drawn once and kept in its folder of results."""
    path = results / ".wandb_id"
    if not path.is_file():
        write_atomic(path, secrets.token_hex(8))
    return path.read_text(encoding="ascii").strip()


def made_by(device: str) -> dict[str, Any]:
    """Facts about where a result comes from: versions, machine, commit, command and time."""
    return {
        "fedtalos": __version__,
        "torch": version("torch"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "device": device,
        "commit": _commit(),
        "command_line": " ".join(sys.argv),
        "folder": str(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The git commit of the code, with a + where files differ from it; None outside a checkout."""
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
    """One line per row, under the first row's keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


class Recorder:
    """Writes one run's rows as they come; ``step_name`` ("round" or "epoch") is the first column's name."""

    def __init__(self, folder: Path, step_name: str, *, keep_to: int = -1, seconds: float = 0.0) -> None:
        """A killed run's rows after step ``keep_to``, and of the test, are dropped; ``seconds`` were spent before."""
        self.folder = folder
        self._path = folder / "metrics.csv"
        self._start = time.perf_counter() - seconds
        self._trackers: list[Tracker] = []
        rows = [[step_name, *COLUMNS]]
        if keep_to >= 0:
            rows += [row for row in _whole_rows(self._path, rows[0]) if int(row[0]) <= keep_to and row[1] != "test"]
        write_atomic(self._path, _csv(rows))

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
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_csv([row]))
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


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _whole_rows(path: Path, header: list[str]) -> list[list[str]]:
    """Data rows; a last one that was not written to its end is left out.

    Raises InputError where the table is not what this version writes.
    """
    content = path.read_bytes() if path.exists() else b""
    try:
        rows = list(csv.reader(io.StringIO(content[: content.rfind(b"\n") + 1].decode())))
        if (rows and rows[0] != header) or not all(len(row) == len(header) and int(row[0]) >= 0 for row in rows[1:]):
            raise ValueError("other columns")
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: broken, or of another version; start a run of another name") from error
    return rows[1:]
