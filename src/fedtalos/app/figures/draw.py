"""Figures of runs and masks, from the files that they left: each function draws into a folder and returns the files.

All figures of a call are rendered before the first is written, so that an error leaves none. Functions raise InputError
where a folder or file is missing or cannot be read. Importing this module takes up to a second: import it late.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.tools import FigureFormat
from fedtalos.app.figures import runs as figures
from fedtalos.app.figures.courses import courses as figure_of_courses
from fedtalos.app.figures.records import FEW, History, read_history, read_report
from fedtalos.app.figures.style import drawable, rendered
from fedtalos.app.run.courses import read_courses
from fedtalos.app.run.runs import check_one_data_set
from fedtalos.app.run.split_file import counts_shown, read_split, split_title
from fedtalos.errors import InputError
from fedtalos.facts import Count, Number, facts_from, open_schema
from fedtalos.files import refuse_link, write_atomic
from fedtalos.training.editing.combine import overlap
from fedtalos.training.editing.describe import density_table
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.federated.partition import Scheme

LONGEST_NAME = 100
"""Most characters of a name put together; the system allows 255 bytes."""
MANY_ALIKE = 20
"""Clients of a split that is alike for all of which no figure is drawn if there are more: nothing is to be seen."""


@open_schema
@dataclass(frozen=True)
class _SplitOptions:
    """Options of config.yaml that name a split."""

    partition: Scheme
    classes_per_client: Count | None = None
    alpha: Number | None = None


def plot_run(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draw every figure of one run in which there is something to see.

    curves.png, and megabytes.png where it sent bytes, of more than three points; clients.png where the run has a
    split.npz, unless it is an even one of many clients; continual.png where tasks came one after another.
    """
    return write_figures(_run(run_dir), plots_dir)


def plot_split(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draw clients.png, who holds which classes, of a federated run; nothing for another run or an even split."""
    return write_figures(_split(run_dir), plots_dir)


def plot_comparison(run_dirs: Sequence[Path], plots_dir: Path) -> list[Path]:
    """Draw several runs over each other: curves.png, and megabytes.png of the runs that sent bytes, if any.

    Nothing is drawn of runs that all have three points or fewer: a table says as much.

    Raises InputError, too, where runs share a name, are of different data sets, or are too many to tell apart.
    """
    return write_figures(_comparison(run_dirs), plots_dir)


def plot_masks(mask_paths: Sequence[Path], plots_dir: Path) -> list[Path]:
    """Draw each mask's density, MASK_density.png, and of two or more their overlap.png.

    Where names clash, files are FOLDER_MASK_density.png. Raises InputError, too, where two share folder and name, or
    masks were made for different models.
    """
    return write_figures(_masks(mask_paths), plots_dir)


def plot_iterations(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draw RUN_iterations.png, what each iteration of an edit let move; nothing where it had only one."""
    return write_figures(_iterations(run_dir), plots_dir)


def plot_all(
    runs: Sequence[Path],
    masks: Sequence[Path],
    edits: Sequence[Path],
    plots_dir: Path,
    form: FigureFormat = "png",
) -> list[Path]:
    """Draw one run, or a comparison of several, masks, and edits' iterations into one folder."""
    drawn: dict[str, Figure] = {}
    if runs:
        drawn |= _run(runs[0]) if len(runs) == 1 else _comparison(runs)
    if masks:
        drawn |= _masks(masks)
    for edit in edits:
        drawn |= _iterations(edit)
    return write_figures(drawn, plots_dir, form)


def write_figures(drawn: Mapping[str, Figure], plots_dir: Path, form: FigureFormat = "png") -> list[Path]:
    """Write a file NAME.png (or pdf, svg) of each figure by name, once all are rendered."""
    refuse_link(plots_dir)
    contents = {plots_dir / f"{name}.{form}": rendered(figure, form) for name, figure in drawn.items()}
    for path, content in contents.items():
        write_atomic(path, content)
    return list(contents)


def name_together(names: Sequence[str]) -> str:
    """Name a folder for figures of several runs or masks, so that those of others are not overwritten.

    >>> name_together(["dense", "masked"])
    'dense-vs-masked'
    """
    name = "-vs-".join(names)
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{names[0][:40]}-and-{len(names) - 1}-more-{digest}"


def mask_names(mask_paths: Sequence[Path]) -> list[str]:
    """Names of masks in figures: of their files, and where these clash of their folders too."""
    names = [path.stem for path in mask_paths]
    if len(set(names)) < len(names):  # clients' masks of several runs
        names = [f"{path.resolve().parent.name}_{path.stem}" for path in mask_paths]
    return names


def _run(run_dir: Path) -> dict[str, Figure]:
    history = read_history(run_dir)
    return {**_curves([history]), **_megabytes([history]), **_split(run_dir), **_courses(run_dir)}


def _comparison(run_dirs: Sequence[Path]) -> dict[str, Figure]:
    if not 1 <= len(run_dirs) <= figures.MOST_RUNS:
        raise InputError(
            f"runs to compare: expected 1 to {figures.MOST_RUNS}, which colours can tell apart, "
            f"got {len(run_dirs)}; choose which to show"
        )
    histories = [read_history(run_dir) for run_dir in run_dirs]
    _check_names("runs", [history.name for history in histories])
    check_one_data_set(run_dirs)
    return {**_curves(histories), **_megabytes(histories)}


def _curves(histories: Sequence[History]) -> dict[str, Figure]:
    return {"curves": figures.curves(histories)} if _worth_drawing(histories) else {}


def _megabytes(histories: Sequence[History]) -> dict[str, Figure]:
    sent = [history for history in histories if history.sent]
    return {"megabytes": figures.megabytes(sent)} if _worth_drawing(sent) else {}


def _worth_drawing(histories: Sequence[History]) -> bool:
    """Tell whether there are enough points for more to be seen than in a table."""
    return any(history.points > FEW for history in histories)


def _split(run_dir: Path) -> dict[str, Figure]:
    split = read_split(run_dir)
    if split is None:
        return {}
    counts, number = counts_shown(split)
    path = run_dir / "config.yaml"
    options = facts_from(_SplitOptions, read_yaml(path), f"{path}: expected the run's options", "make the run anew")
    if options.partition == "iid" and split.client.max() >= MANY_ALIKE:
        return {}
    name = split_title(options.partition, options.classes_per_client, options.alpha)
    title = f"Images of each class at each client\n{name}, {number}"
    names = [drawable(name, 40) for name in split.classes[: counts.shape[1]]]
    return {"clients": figures.clients(counts, names, title)}


def _courses(run_dir: Path) -> dict[str, Figure]:
    found = read_courses(run_dir)
    return {"continual": figure_of_courses(found, drawable(run_dir.resolve().name))} if found else {}


def _masks(mask_paths: Sequence[Path]) -> dict[str, Figure]:
    names = mask_names(mask_paths)
    _check_names("masks", names)
    masks = [read_mask_file(path) for path in mask_paths]
    drawn = {}
    for name, (mask, facts) in zip(names, masks, strict=True):
        rows = density_table(mask, facts.eligible_in)
        title = f"Where entries may move, by block and kind\n{name}: {100 * facts.density:.1f} % in all"
        drawn[f"{name}_density"] = figures.density(rows, drawable(title))
    if len(masks) > 1:
        shares = np.array([[overlap(first, second) for first, _ in masks] for second, _ in masks])
        drawn["overlap"] = figures.overlap([*map(drawable, names)], shares)
    return drawn


def _iterations(run_dir: Path) -> dict[str, Figure]:
    report = read_report(run_dir)
    if len(report) < 2:
        return {}
    name = run_dir.resolve().name
    return {f"{name}_iterations": figures.iterations(report, drawable(name))}


def _check_names(what: str, names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times != 1:
        came = f"{times} named {name}" if names else "none"
        raise InputError(f"{what} to plot: expected one or more, each with its own name, got {came}; rename or choose")
