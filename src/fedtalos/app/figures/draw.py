"""Figures of runs and masks, from the files that they left: each function draws into a folder and returns the files.

All figures of a call are rendered before the first is written, so that an error leaves none. Functions raise InputError
where a folder or file is missing or cannot be read. Importing this module takes up to a second: import it late.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pydantic import BaseModel, ValidationError

from fedtalos.app.config.files import read_yaml
from fedtalos.app.figures import runs as figures
from fedtalos.app.figures.records import History, check_one_data_set, read_history, read_report
from fedtalos.app.figures.style import drawable, png
from fedtalos.app.run.split_file import read_split
from fedtalos.errors import InputError
from fedtalos.files import write_atomic
from fedtalos.training.editing.combine import overlap
from fedtalos.training.editing.describe import density_table
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.federated.clients import class_counts

LONGEST_NAME = 100
"""Most characters of a name put together; the system allows 255 bytes."""


class _SplitOptions(BaseModel):
    """Options of config.yaml that name a split."""

    partition: str
    classes_per_client: int | None = None
    alpha: float | None = None


def plot_run(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draw every figure that one run's records allow.

    curves.png always, clients.png where the run has a split.npz, megabytes.png where it sent bytes.
    """
    return write_figures(_run(run_dir), plots_dir)


def plot_split(run_dir: Path, plots_dir: Path) -> list[Path]:
    """Draw clients.png, who holds which classes, of a federated run; nothing for another run."""
    return write_figures(_split(run_dir), plots_dir)


def plot_comparison(run_dirs: Sequence[Path], plots_dir: Path) -> list[Path]:
    """Draw several runs over each other: curves.png always, megabytes.png of the runs that sent bytes, if any.

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


def plot_all(runs: Sequence[Path], masks: Sequence[Path], edits: Sequence[Path], plots_dir: Path) -> list[Path]:
    """Draw one run, or a comparison of several, masks, and edits' iterations into one folder."""
    drawn: dict[str, Figure] = {}
    if runs:
        drawn |= _run(runs[0]) if len(runs) == 1 else _comparison(runs)
    if masks:
        drawn |= _masks(masks)
    for edit in edits:
        drawn |= _iterations(edit)
    return write_figures(drawn, plots_dir)


def write_figures(drawn: Mapping[str, Figure], plots_dir: Path) -> list[Path]:
    """Write NAME.png of each figure by name, once all are rendered."""
    contents = {plots_dir / f"{name}.png": png(figure) for name, figure in drawn.items()}
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


def split_title(partition: str, classes_per_client: int | None, alpha: float | None) -> str:
    """Name a split for a title, e.g. "IID" or "2 classes per client"."""
    known = {
        "iid": "IID",
        "label_skew": f"{classes_per_client} class{'' if classes_per_client == 1 else 'es'} per client",
        "dirichlet": f"Dirichlet, alpha {alpha}",
        "quantity": "unequal amounts",
    }
    return known.get(partition, partition)


def _run(run_dir: Path) -> dict[str, Figure]:
    history = read_history(run_dir)
    return {"curves": figures.curves([history]), **_megabytes([history]), **_split(run_dir)}


def _comparison(run_dirs: Sequence[Path]) -> dict[str, Figure]:
    if not 1 <= len(run_dirs) <= figures.MOST_RUNS:
        raise InputError(
            f"runs to compare: expected 1 to {figures.MOST_RUNS}, which colours can tell apart, "
            f"got {len(run_dirs)}; choose which to show"
        )
    histories = [read_history(run_dir) for run_dir in run_dirs]
    _check_names("runs", [history.name for history in histories])
    check_one_data_set(run_dirs)
    return {"curves": figures.curves(histories), **_megabytes(histories)}


def _megabytes(histories: Sequence[History]) -> dict[str, Figure]:
    sent = [history for history in histories if history.sent]
    return {"megabytes": figures.megabytes(sent)} if sent else {}


def _split(run_dir: Path) -> dict[str, Figure]:
    split = read_split(run_dir)
    if split is None:
        return {}
    held_by = int(split.client.max()) + 1
    shown = min(held_by, figures.MOST_CLIENTS)
    counts = class_counts(split.client, split.label, shown, len(split.classes))
    number = f"{held_by} clients" if shown == held_by else f"the first {shown} of {held_by:,} clients"
    path = run_dir / "config.yaml"
    try:
        options = _SplitOptions.model_validate(read_yaml(path))
    except ValidationError as error:
        raise InputError(f"{path}: expected the run's options, a YAML mapping; make the run anew") from error
    name = split_title(options.partition, options.classes_per_client, options.alpha)
    title = f"Images of each class at each client\n{name}, {number}"
    return {"clients": figures.clients(counts, [*map(drawable, split.classes)], title)}


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
