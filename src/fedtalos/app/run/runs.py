"""Runs on disk: what each is, how far it has come, and whether a process works on it."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtalos.app.config.files import nearest, read_yaml
from fedtalos.app.run.paths import RunPaths
from fedtalos.errors import InputError
from fedtalos.files import is_locked

State = Literal["running", "stopped", "finished", "broken"]
RECORDS = ("metrics.csv", "report.csv", "cells.csv")
"""Tables that training, an edit and a sweep leave in their folder of results."""
TOTALS = {"centralized": "num_epochs", "federated": "num_rounds", "editing": "num_iterations"}
UNITS = {"centralized": "epoch", "federated": "round", "editing": "iteration"}


@dataclass(frozen=True)
class Run:
    """State of a run; accuracies 0 to 1, nan where not known, as are the seconds that are left."""

    paths: RunPaths
    command: str
    state: State
    done: int = 0
    total: int = 0
    loss: float = math.nan
    """Loss of the last round of training."""
    best: float = math.nan
    """Best accuracy on validation."""
    test: float = math.nan
    """Accuracy of the last model, at the end, on so many ``tested`` images."""
    tested: int = 0
    sent: float = 0.0
    """Bytes down and up."""
    seconds: float = 0.0
    left: float = math.nan

    @property
    def unit(self) -> str:
        """Unit that the run counts: epoch, round or iteration."""
        return UNITS.get(self.command, "step")


def read_run(paths: RunPaths) -> Run:
    """Find out how a run stands, from its records and its lock; one that cannot be read is "broken".

    >>> read_run(RunPaths(Path(), "dense")).state
    'running'
    """
    state: State = "finished" if paths.finished else "running" if is_locked(paths.lock) else "stopped"
    try:
        config = read_yaml(paths.config)
        command = str(config.get("command"))
        total = int(config.get(TOTALS.get(command, ""), 0)) * _units_apart(config)
        if command == "editing":
            return _edit(paths, state, total)
        return _training(paths, command, state, total)
    except (
        InputError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        OSError,
        csv.Error,
    ):
        return Run(paths, "", "broken")


def _units_apart(config: Mapping[str, Any]) -> int:
    """Number of tasks that train one after another, each its own rounds; 1 where none do."""
    return 1 if config.get("tasks") is None else int(config["tasks"]) - len(config.get("leave_out", ()))


def _training(paths: RunPaths, command: str, state: State, total: int) -> Run:
    rows = list(_rows(paths.results / "metrics.csv"))
    train = [row for row in rows if row["split"] == "train"]
    val = [float(row["accuracy"]) for row in rows if row["split"] == "val"]
    tests = [row for row in rows if row["split"] == "test"]
    test, tested = (float(tests[-1]["accuracy"]), int(tests[-1]["examples"])) if tests else (math.nan, 0)
    done, seconds = (int(train[-1][UNITS[command]]), float(rows[-1]["seconds"])) if train else (0, 0.0)
    best, left = max(val, default=math.nan), math.nan
    if len(train) > 1 and state == "running":
        first, took = int(train[0][UNITS[command]]), seconds - float(train[0]["seconds"])
        left = took / (done - first) * (total - done)
    loss = float(train[-1]["loss"]) if train else math.nan
    sent = float(rows[-1]["bytes_down"]) + float(rows[-1]["bytes_up"]) if rows else 0.0
    return Run(paths, command, state, done, total, loss, best, test, tested, sent, seconds, left)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Whole lines of a table that may be written to at this moment."""
    content = path.read_bytes() if path.is_file() else b""
    yield from csv.DictReader(io.StringIO(content[: content.rfind(b"\n") + 1].decode()))


def _edit(paths: RunPaths, state: State, total: int) -> Run:
    path = paths.checkpoints / "last.json"
    saved: Any = json.loads(path.read_bytes()) if path.is_file() else {}
    rows = saved.get("rows", [])
    done, seconds = (int(rows[-1]["iteration"]), float(rows[-1]["seconds"])) if rows else (0, 0.0)
    left = seconds / done * (total - done) if done and state == "running" else math.nan
    return Run(paths, "editing", state, done, total, seconds=seconds, left=left)


def all_runs(root: Path) -> list[RunPaths]:
    """List every run under ``root``, the newest first."""
    configs = sorted((root / "results").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [RunPaths(root, path.parent.name) for path in configs]


def run_folder(path: Path, results: Path) -> Path:
    """Find the folder of results that a path or a run's name means: the one that holds records.

    >>> run_folder(Path("dense"), Path("results"))
    PosixPath('results/dense')
    """
    candidates = [path, results / path]
    found = [folder for folder in candidates if any((folder / name).is_file() for name in RECORDS)]
    return found[0] if found else path if path.is_dir() and not (results / path).exists() else results / path


def is_sweep(folder: Path) -> bool:
    """Tell whether a folder of results is of a sweep, not of a run.

    >>> is_sweep(Path("results/laptop"))
    True
    """
    return (folder / "cells.csv").is_file() and not (folder / "metrics.csv").is_file()


def named_run(path: Path, root: Path) -> RunPaths:
    """Find the run that a name, or any of its folders, means. InputError where there is none."""
    candidates = [path, root / "results" / path]
    if path.parent.name in ("checkpoints", "plots"):
        candidates.append(path.parents[1] / "results" / path.name)
    for folder in candidates:
        at = folder.resolve()
        if (folder / "config.yaml").is_file() and at.parent.name == "results":
            here = root if at.parents[1] == root.resolve() else at.parents[1]
            return RunPaths(here, at.name)
    there = [paths.name for paths in all_runs(root)]
    hint = nearest(str(path), there) or ("; `fedtalos runs` lists those that are there" if there else "; there is none")
    raise InputError(f"run {path}: no such run in {root / 'results'}{hint}")


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
                "whose accuracies are not to be read on one axis; take the runs of each data set by themselves"
            )


def _data_set(run_dir: Path) -> tuple[str, set[str]] | None:
    """The data set of a run in words, and what tells it: one of these suffices."""
    path = run_dir / "config.yaml"
    config = read_yaml(path) if path.is_file() else {}
    name, made_by = config.get("dataset"), config.get("made_by")
    if not isinstance(name, str):
        return None
    if name not in ("folder", "csv"):
        return name, {name}
    record: dict[str, Any] = made_by if isinstance(made_by, dict) else {}
    place, inputs = Path(str(record.get("folder", ""))) / str(config.get("data_dir")), record.get("inputs")
    return f"the {'table' if name == 'csv' else 'folder'} {place}", {
        str(place),
        *([str(inputs.get("data"))] if isinstance(inputs, dict) else []),
    }


def comparable(paths: RunPaths, looked_at: int = 10) -> str | None:
    """Name the newest other run, of the ``looked_at`` newest, that is trained and of the same images; None: none is."""
    for other in all_runs(paths.root)[:looked_at]:
        if other.name == paths.name or not other.finished or not (other.results / "metrics.csv").is_file():
            continue
        try:
            check_one_data_set([paths.results, other.results])
        except InputError:  # of other images, or broken
            continue
        return other.name
    return None
