"""Runs on disk: what each is, how far it has come, and whether a process works on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval, MaxLen

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.rounds import units_apart
from fedtalos.app.run.books import Edited
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import MetricsLine, known
from fedtalos.errors import InputError, nearest
from fedtalos.facts import (
    MOST_JSON,
    MOST_TABLE,
    Count,
    Word,
    facts_from,
    open_schema,
    read_facts,
    read_file,
    table_of,
    table_schema,
)
from fedtalos.files import is_locked

Name = Annotated[str, MaxLen(2**14)]
"""A path, a sentence, or what else a record holds."""
Total = Annotated[int, Interval(ge=0, le=10**9)]
State = Literal["running", "stopped", "finished", "broken"]
RECORDS = ("metrics.csv", "report.csv", "cells.csv")
"""Tables that training, an edit and a sweep leave in their folder of results."""
TOTALS = {
    "centralized": "num_epochs",
    "federated": "num_rounds",
    "continual": "num_rounds",
    "editing": "num_iterations",
}
UNITS = {"centralized": "epoch", "federated": "round", "continual": "round", "editing": "iteration"}


@open_schema
@dataclass(frozen=True)
class MadeBy:
    """Facts of config.yaml on how a run was made, those that are read again."""

    folder: Name = ""
    decided: Annotated[dict[Word, Name], MaxLen(1000)] = field(default_factory=dict)
    """Sentences on what was decided for the user, by what about."""
    inputs: Annotated[dict[Word, Name | None], MaxLen(100)] = field(default_factory=dict)
    """Fingerprints, by what they are of."""


@open_schema
@dataclass(frozen=True)
class _Record:
    """Facts of config.yaml that tell how a run stands, and of which images it is."""

    command: Word = ""
    num_epochs: Total | None = None
    num_rounds: Total | None = None
    num_iterations: Total | None = None
    num_clients: Total | None = None
    tasks: Total | None = None
    one_shot: bool = False
    leave_out: Annotated[tuple[Count, ...], MaxLen(2**16)] = ()
    dataset: Word | None = None
    data_dir: Name | None = None
    made_by: MadeBy | str | None = None

    @property
    def made(self) -> MadeBy | None:
        """The part on how the run was made, where there is one of this kind."""
        return self.made_by if isinstance(self.made_by, MadeBy) else None

    @property
    def total(self) -> int:
        """Epochs, rounds or iterations of the whole run."""
        each: int | None = 1 if self.one_shot else getattr(self, TOTALS.get(self.command, ""), None)
        units = units_apart(self.num_clients or 0, self.tasks, one_shot=self.one_shot) - len(self.leave_out)
        passes = 2 if self.command == "continual" else 1
        return passes * (each or 0) * max(0, units)


@table_schema
@dataclass(frozen=True)
class _Line(MetricsLine):
    """A row of metrics.csv, and when it was written."""

    seconds: Annotated[float, Interval(ge=0, le=1e12)] = 0.0


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
        record = _record(paths.config)
        command = record.command
        if command == "editing":
            return _edit(paths, state, record.total)
        return _training(paths, command, state, record.total)
    except InputError:
        return Run(paths, "", "broken")


def _record(path: Path) -> _Record:
    return facts_from(_Record, read_yaml(path), f"{path}: broken", "make the run anew")


def made_by_then(path: Path) -> MadeBy | None:
    """Read how a run was made, from its config.yaml; None where that does not say.

    >>> made_by_then(Path("results/dense/config.yaml")).inputs
    {'data': 'digits'}
    """
    return _record(path).made


def _training(paths: RunPaths, command: str, state: State, total: int) -> Run:
    rows = _rows(paths.results / "metrics.csv")
    train, val, tests = ([row for row in rows if row.split == split] for split in ("train", "val", "test"))
    accuracies = [share for row in val if not math.isnan(share := known(row.accuracy))]
    test, tested = (known(tests[-1].accuracy), tests[-1].examples or 0) if tests else (math.nan, 0)
    done, seconds = (train[-1].step, rows[-1].seconds) if train else (0, 0.0)
    best, left = max(accuracies, default=math.nan), math.nan
    if len(train) > 1 and state == "running" and (steps := done - train[0].step) > 0:
        left = max(0.0, seconds - train[0].seconds) / steps * max(0, total - done)
    loss = known(train[-1].loss) if train else math.nan
    sent = known(rows[-1].bytes_down) + known(rows[-1].bytes_up) if rows else 0.0
    return Run(paths, command, state, done, total, loss, best, test, tested, sent, seconds, left)


def _rows(path: Path) -> list[_Line]:
    """Whole lines of a table that may be written to at this moment."""
    if not path.exists():
        return []
    content = read_file(path, str(path), most=MOST_TABLE)
    content = content[: content.rfind(b"\n") + 1]
    return table_of(_Line, content, path, first="step")[1] if content else []


def _edit(paths: RunPaths, state: State, total: int) -> Run:
    path = paths.checkpoints / "last.json"
    if not path.exists():
        return Run(paths, "editing", state, 0, total)
    last = read_facts(Edited, read_file(path, str(path), most=MOST_JSON), str(path)).rows[-1]
    left = last.seconds / last.iteration * max(0, total - last.iteration) if last.iteration else math.nan
    left = left if state == "running" else math.nan
    return Run(paths, "editing", state, last.iteration, total, seconds=last.seconds, left=left)


def all_runs(root: Path) -> list[RunPaths]:
    """List every run under ``root``, the newest first."""
    configs = sorted((root / "results").glob("*/config.yaml"), key=_written, reverse=True)
    return [RunPaths(root, path.parent.name) for path in configs]


def _written(path: Path) -> float:
    """Time at which a file was written; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


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
        if (folder / "config.yaml").is_file() and (at := folder.resolve()).parent.name == "results":
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
    if not path.is_file():
        return None
    record = _record(path)
    name, made_by = record.dataset, record.made or MadeBy()
    if name is None or name not in ("folder", "csv"):
        return None if name is None else (name, {name})
    place, data = Path(made_by.folder) / str(record.data_dir), made_by.inputs.get("data")
    same = {str(place), *([] if data is None else [data])}
    return f"the {'table' if name == 'csv' else 'folder'} {place}", same


def comparable(paths: RunPaths) -> str | None:
    """Name the newest other run, of the ten newest, that is trained and of the same images; None: none is."""
    for other in all_runs(paths.root)[:10]:
        if other.name == paths.name or not other.finished or not (other.results / "metrics.csv").is_file():
            continue
        try:
            check_one_data_set([paths.results, other.results])
        except InputError:  # of other images, or broken
            continue
        return other.name
    return None
