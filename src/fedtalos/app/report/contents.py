"""Contents of a report, gathered from what runs left behind: figures, curves, splits, masks, options."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from annotated_types import MaxLen

from fedtalos.app.config.files import read_yaml
from fedtalos.app.figures.records import History, read_history
from fedtalos.app.report.mistakes import Classes
from fedtalos.app.report.pictures import map_of
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.resume import MAY_DIFFER
from fedtalos.app.run.split_file import counts_shown, read_split, split_title
from fedtalos.app.run.units import duration, megabytes, percent, thousands
from fedtalos.app.sweep.tables import Spread
from fedtalos.errors import InputError, printable
from fedtalos.facts import Count, Number, Share, Word, facts_from, open_schema, read_table, table_schema
from fedtalos.metrics import wilson
from fedtalos.training.editing.describe import density_table
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.federated.personal import mean_and_worst

UNKNOWN = dict.fromkeys(("command_line", "device", "commit", "fedtalos", "torch", "started"), "unknown")
MOST_POINTS = 400
"""Points of a curve; of more, evenly spaced ones are shown."""
SAME = {"seed", "command", "made_by", *MAY_DIFFER}
"""Keys of config.yaml in which runs may differ that are one method's."""
Named = Annotated[dict[Word, Number | None], MaxLen(100)]
"""Numbers by name; None where one is not known."""


@open_schema
@dataclass(frozen=True)
class _Summary:
    """Facts of summary.yaml that the page shows."""

    test_accuracy: Named = field(default_factory=dict)
    val_accuracy: Named = field(default_factory=dict)
    megabytes_sent: Annotated[dict[Word, Number], MaxLen(100)] = field(default_factory=dict)
    energy_wh: Named = field(default_factory=dict)
    seconds: Number = math.nan
    images_trained_on: Count = 0


@dataclass(frozen=True)
class RunRecord:
    """A finished run: its records, as they were read."""

    paths: RunPaths
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: History

    @property
    def made_by(self) -> Mapping[str, Any]:
        """Versions, commit, command line, and what was decided for the user; "unknown" where the record lacks it."""
        found = self.config.get("made_by")
        known = {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
        decided = known.get("decided")
        return {**UNKNOWN, **known, "decided": decided if isinstance(decided, dict) else {}}


@dataclass(frozen=True)
class Method:
    """Runs that differ by their seed alone, or one run; ``point``: its values on the axes of a grid."""

    name: str
    runs: Sequence[RunRecord]
    point: Mapping[str, str]


def read_records(paths: RunPaths, summary: Mapping[str, Any] | None = None) -> RunRecord:
    """Read a run's records; ``summary`` where it is not written yet.

    Raises InputError for a run that is not finished, or whose records cannot be read.
    """
    if summary is None and not paths.finished:
        raise InputError(f"{paths.results}: no finished run; `fedtalos runs` lists them, and --resume finishes one")
    path = paths.results / "summary.yaml"
    found = facts_from(
        _Summary, read_yaml(path) if summary is None else summary, f"{path}: broken", "make the run anew"
    )
    return RunRecord(paths, read_yaml(paths.config), asdict(found), read_history(paths.results))


def methods_of(runs: Sequence[RunRecord]) -> list[Method]:
    """Put runs together that differ by their seed alone, in the order in which they came."""
    alike: dict[str, list[RunRecord]] = {}
    for run in runs:
        made = {key: str(value) for key, value in run.config.items() if key not in SAME}
        alike.setdefault(yaml.safe_dump(made), []).append(run)
    return [Method(_common_name([run.paths.name for run in those]), those, {}) for those in alike.values()]


def _common_name(names: Sequence[str]) -> str:
    """The part that names begin with, where they share one; else the first."""
    if len(names) == 1:
        return names[0]
    start = names[0][: next((i for i, chars in enumerate(zip(*names, strict=False)) if len(set(chars)) > 1), None)]
    return start.rstrip("-_. ") or names[0]


def headlines(method: Method) -> dict[str, str]:
    """Figures of a method as people read them: accuracy with its deviation or interval, what it sent, what it took."""
    last, best = (_of(method, "test_accuracy", key) for key in ("last", "best_on_val"))
    found = {"test accuracy": _share(method, last), "of the model that was best on validation": _share(method, best)}
    found["validation accuracy"] = _share(method, _of(method, "val_accuracy", "last"), of_test=False)
    sent = fmean([sum(run.summary.get("megabytes_sent", {}).values()) for run in method.runs])
    if sent:
        found["sent by and to all clients"] = megabytes(1e6 * sent)
    seconds = fmean([float(run.summary.get("seconds", math.nan)) for run in method.runs])
    images = fmean([float(run.summary.get("images_trained_on", 0)) for run in method.runs])
    found |= {"took": duration(seconds), "trained on": f"{thousands(images)} images"}
    for part in ("processors", "card"):
        energy = fmean(_of(method, "energy_wh", part))
        found |= {} if math.isnan(energy) else {f"energy of the {part}": f"{energy:.3g} Wh"}
    return found


def _share(method: Method, shares: Sequence[float], *, of_test: bool = True) -> str:
    """Mean and deviation over seeds; of one run the share with its 95 % interval."""
    spread = Spread.of([100 * share for share in shares])
    if not math.isnan(spread.std):
        return f"{spread.mean:.1f} ± {spread.std:.1f} %"
    tested = max((row.examples for row in method.runs[0].history.rows if row.split == "test"), default=0)
    low, high = wilson(shares[0], tested)
    between = "" if not of_test or math.isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})"
    return percent(shares[0]) + between


def _of(method: Method, group: str, key: str) -> list[float]:
    values = [run.summary.get(group, {}).get(key) for run in method.runs]
    return [math.nan if value is None else float(value) for value in values]


def curves(method: Method) -> dict[str, Any]:
    """The method's curves for the page's script: points [step, MB, accuracy %, deviation, loss] by split."""
    found: dict[str, Any] = {"name": method.name, "step": method.runs[0].history.step_name, "point": dict(method.point)}
    for split in ("val", "train", "test"):
        by_run = [{row.step: row for row in run.history.rows if row.split == split} for run in method.runs]
        steps = sorted(set.intersection(*(set(rows) for rows in by_run)))
        points = []
        for step in sorted({*steps[:: max(1, len(steps) // MOST_POINTS)], *steps[-1:]}):
            rows = [one[step] for one in by_run]
            accuracy = Spread.of([100 * row.accuracy for row in rows])
            deviation = 0.0 if math.isnan(accuracy.std) else accuracy.std
            sent, loss = fmean(row.megabytes for row in rows), fmean(row.loss for row in rows)
            numbers = (sent, accuracy.mean, deviation, loss)
            if all(map(math.isfinite, numbers)):
                points.append([step, *(float(f"{number:.5g}") for number in numbers)])
        found[split] = points
    return found


@dataclass(frozen=True)
class Split:
    """A picture of who holds how many images: a row per class, a column per client."""

    title: str
    picture: str


def split_of(run: RunRecord) -> Split | None:
    """Draw who holds how many images of which class; None where the run has no clients."""
    split = read_split(run.paths.results)
    if split is None:
        return None
    counts, number = counts_shown(split)
    config = run.config
    scheme = split_title(str(config.get("partition")), config.get("classes_per_client"), config.get("alpha"))
    title = f"{scheme}, {number}: darkest are {thousands(float(counts.max()))} images, empty cells none"
    return Split(title, map_of(counts.T.astype(float)))


@dataclass(frozen=True)
class Densities:
    """Share of the entries that may move (%), by block (rows) and kind of tensor (columns); None where none are."""

    title: str
    kinds: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


def densities_of(run: RunRecord) -> Densities | None:
    """Read the densities of the run's mask; None where it has none, or the file is not at hand."""
    named = run.config.get("mask")
    path = (
        None
        if named is None
        else next((p for p in (Path(str(named)), run.paths.root / str(named)) if p.is_file()), None)
    )
    if path is None:
        return None
    mask, facts = read_mask_file(path)
    rows = density_table(mask, facts.eligible_in)
    share = {(row.place, row.kind): 100 * row.density for row in rows}
    kinds = list(dict.fromkeys(row.kind for row in rows))
    places = [place for _, place in sorted({(row.block, row.place) for row in rows})]
    title = f"{path.name}: {100 * facts.density:.1f} % of the eligible entries may move"
    return Densities(title, kinds, [(place, [share.get((place, kind)) for kind in kinds]) for place in places])


@dataclass(frozen=True)
class ClientAccuracies:
    """Accuracy (%) of the clients: each one's, their mean, and the mean of the worst tenth."""

    sorted: Sequence[float]
    mean: str
    worst: str


@table_schema
@dataclass(frozen=True)
class _ClientLine:
    """The column of client_accuracy.csv that is shown; empty where no class of the client's was tested."""

    accuracy: Share | Literal[""]


def client_accuracies(run: RunRecord) -> ClientAccuracies | None:
    """Read client_accuracy.csv; None where the run has none (``--client_evaluation`` makes it)."""
    path = run.paths.results / "client_accuracy.csv"
    if not path.is_file():
        return None
    _, lines = read_table(_ClientLine, path)
    found = sorted(100 * line.accuracy for line in lines if isinstance(line.accuracy, float))
    if not found:
        return None
    said = mean_and_worst(np.array(found))
    return ClientAccuracies(found, f"{said['mean']:.1f} %", f"{said['worst_10_percent']:.1f} %")


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    title: str
    methods: Sequence[Method]
    axes: Mapping[str, Sequence[str]]
    """Axes of a grid, and the values on each."""
    classes: Classes | None = None

    @property
    def single(self) -> RunRecord | None:
        """The run, where the report is of one alone."""
        runs = [run for method in self.methods for run in method.runs]
        return runs[0] if len(runs) == 1 else None


def report_of(runs: Sequence[RunRecord], classes: Classes | None = None) -> Report:
    """Gather a report of runs; those that differ by their seed alone become one line."""
    methods = methods_of(runs)
    names = [method.name for method in methods]
    return Report(names[0] if len(names) == 1 else f"{len(runs)} runs", methods, {}, classes)


def config_text(run: RunRecord) -> str:
    """Options of a run as YAML, without what the record says of where it was made."""
    return yaml.safe_dump({k: v for k, v in run.config.items() if k != "made_by"}, sort_keys=False, allow_unicode=True)


def files_of(run: RunRecord) -> list[str]:
    """Names of the files that the run left, by folder."""
    paths = run.paths
    folders = (paths.results, paths.plots, paths.checkpoints)
    return [
        printable(str(path.relative_to(paths.root)))
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]
