"""The plot command: read what runs and masks left behind, draw every figure that it allows."""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pydantic import BaseModel, ValidationError

from fedtalos.app.config.files import read_yaml
from fedtalos.app.figures import runs as figures
from fedtalos.app.figures.runs import History, Row
from fedtalos.app.figures.style import png
from fedtalos.app.run.split_file import read_split
from fedtalos.errors import InputError, shown
from fedtalos.files import write_atomic
from fedtalos.training.editing.mask_file import DensityRow, density_table, load_mask, overlap
from fedtalos.training.federated.clients import class_counts

_STEP_NAMES = ("round", "epoch")
_COLUMNS = ("split", "loss", "accuracy", "bytes_down", "bytes_up")
LARGEST = 1e18
"""Of what is drawn: beyond it the axes fail."""


class _Options(BaseModel):
    """What is read of config.yaml: the options that name a split."""

    partition: str
    classes_per_client: int | None = None
    alpha: float | None = None


def plot_run(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draw every figure that one run's records allow, straight into ``plots_dir``; returns the files.

    curves.png always, clients.png where the run has a split.npz, megabytes.png where it sent bytes.
    Raises InputError where the folder is missing, is not a run's, or its records cannot be read.
    """
    return write_figures(_of_run(run_dir), plots_dir)


def _of_run(run_dir: Path) -> dict[str, Figure]:
    history = read_history(run_dir)
    return {"curves": figures.curves([history]), **_megabytes([history]), **_clients(run_dir)}


def plot_split(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draw clients.png, who holds which classes, of a federated run; nothing for another run."""
    return write_figures(_clients(run_dir), plots_dir)


def plot_comparison(run_dirs: Sequence[Path], plots_dir: Path) -> list[Path]:
    """Draw several runs over each other, straight into ``plots_dir``; returns the files.

    curves.png always, megabytes.png of those runs that sent bytes, if any.
    Raises InputError as ``plot_run`` does, and where runs share a name or are too many to tell apart.
    """
    return write_figures(_of_runs(run_dirs), plots_dir)


def _of_runs(run_dirs: Sequence[Path]) -> dict[str, Figure]:
    if not 1 <= len(run_dirs) <= figures.MOST_RUNS:
        raise InputError(
            f"runs to compare: expected 1 to {figures.MOST_RUNS}, which colours can tell apart, "
            f"got {len(run_dirs)}; choose which to show"
        )
    histories = [read_history(run_dir) for run_dir in run_dirs]
    _check_names("runs", [history.name for history in histories])
    return {"curves": figures.curves(histories), **_megabytes(histories)}


def plot_masks(mask_paths: Sequence[Path], plots_dir: Path) -> list[Path]:
    """Draw each mask's density, and the overlap of two or more, straight into ``plots_dir``; returns the files.

    Files: MASK_density.png each, overlap.png; where names clash, FOLDER_MASK. Raises InputError where a mask cannot be
    read, two share both, or they were made for different models.
    """
    return write_figures(_of_masks(mask_paths), plots_dir)


def _of_masks(mask_paths: Sequence[Path]) -> dict[str, Figure]:
    names = [path.stem for path in mask_paths]
    if len(set(names)) < len(names):  # clients' masks of several runs
        names = [f"{path.resolve().parent.name}_{path.stem}" for path in mask_paths]
    _check_names("masks", names)
    masks = [load_mask(path) for path in mask_paths]
    drawn = {}
    for name, (mask, facts) in zip(names, masks, strict=True):
        rows = density_table(mask, facts.eligible_in)
        title = f"Where entries may move, by block and kind\n{name}: {100 * facts.density:.1f} % in all"
        drawn[f"{name}_density"] = figures.density(rows, title)
    if len(masks) > 1:
        shares = np.array([[overlap(first, second) for first, _ in masks] for second, _ in masks])
        drawn["overlap"] = figures.overlap(names, shares)
    return drawn


def plot_iterations(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draw RUN_iterations.png, what every iteration of an edit let move; nothing where the run had but one.

    Raises InputError where its report cannot be read.
    """
    return write_figures(_of_iterations(run_dir), plots_dir)


def _of_iterations(run_dir: Path) -> dict[str, Figure]:
    path = run_dir / "report.csv"
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = [
                (
                    int(row["iteration"]),
                    DensityRow(int(row["block"]), row["kind"], int(row["active"]), int(row["entries"])),
                )
                for row in csv.DictReader(lines)
            ]
        if any(
            not (0 <= row.active <= row.entries < LARGEST and row.entries and 0 <= at < LARGEST) for at, row in rows
        ):
            raise ValueError("more than can be drawn")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as an edit's report; name a run of `fedtalos editing`") from error
    iterations = {number: [row for at, row in rows if at == number] for number, _ in rows}
    if len(iterations) < 2:
        return {}
    name = run_dir.resolve().name
    return {f"{name}_iterations": figures.iterations(iterations, name)}


def write_figures(drawn: Mapping[str, Figure], plots_dir: Path) -> list[Path]:
    """Render all before the first file is written, so that an error leaves none."""
    contents = {plots_dir / f"{name}.png": png(figure) for name, figure in drawn.items()}
    for path, content in contents.items():
        write_atomic(path, content)
    return list(contents)


def _check_names(what: str, names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times != 1:
        came = f"{times} named {name}" if names else "none"
        raise InputError(f"{what} to plot: expected one or more, each with its own name, got {came}; rename or choose")


def _megabytes(histories: Sequence[History]) -> dict[str, Figure]:
    sent = [
        history
        for history in histories
        if any(row.split != "train" and row.megabytes > 0 and not math.isnan(row.accuracy) for row in history.rows)
    ]
    return {"megabytes": figures.megabytes(sent)} if sent else {}


def read_history(run_dir: Path) -> History:
    """A run's metrics. InputError where they are missing, broken, or hold no accuracy yet."""
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
            rows = [_read_row(path, reader.line_num, step_name, record) for record in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file ({error}); make the run anew") from error
    if not any(math.isfinite(row.accuracy) for row in rows):
        raise InputError(f"{path}: holds no accuracy yet; wait for the run's first evaluation or make the run anew")
    return History(run_dir.resolve().name, step_name, rows)


def _read_row(path: Path, line: int, step_name: str, record: Mapping[str, str]) -> Row:
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


def _clients(run_dir: Path) -> dict[str, Figure]:
    split = read_split(run_dir)
    if split is None:
        return {}
    held_by = int(split.client.max()) + 1
    shown = min(held_by, figures.MOST_CLIENTS)
    counts = class_counts(split.client, split.label, shown, len(split.classes))
    number = f"{held_by} clients" if shown == held_by else f"the first {shown} of {held_by:,} clients"
    title = f"Images of each class at each client\n{_words(_read_options(run_dir))}, {number}"
    return {"clients": figures.clients(counts, split.classes, title)}


def _read_options(run_dir: Path) -> _Options:
    path = run_dir / "config.yaml"
    try:
        return _Options.model_validate(read_yaml(path))
    except ValidationError as error:
        raise InputError(f"{path}: expected the run's options, a YAML mapping; make the run anew") from error


def _words(options: _Options) -> str:
    """The split in words, e.g. "label skew, 2 classes per client"."""
    known = {
        "iid": "IID",
        "label_skew": f"label skew, {options.classes_per_client} classes per client",
        "dirichlet": f"Dirichlet, alpha {options.alpha}",
        "quantity": "unequal amounts",
    }
    return known.get(options.partition, options.partition)
