"""Draw the figures of one run, of several compared, of a sweep, and of masks."""

import csv
from pathlib import Path

from rich.console import Console

from fedtalos.app.config.tools import PlotConfig
from fedtalos.app.figures import draw
from fedtalos.app.run.display import say
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.app.sweep.grid import expand, read_grid
from fedtalos.app.sweep.plots import plot_grid
from fedtalos.app.sweep.tables import read_result
from fedtalos.errors import InputError

RECORDS = ("metrics.csv", "report.csv", "cells.csv")
"""Tables that training, an edit and a sweep leave in their folder of results."""


def run(config: PlotConfig, console: Console) -> None:
    """Draw every figure that the named runs and masks allow, into one folder under plots/; print the files."""
    if not config.runs and not config.masks:
        raise InputError("plot: expected runs or --masks, got neither; name a run under results/ or a mask file")
    folders = [folder_of(path, config.output_dir / "results") for path in config.runs]
    sweeps = [path for path in folders if (path / "cells.csv").is_file() and not (path / "metrics.csv").is_file()]
    if sweeps and (len(folders) > 1 or config.masks):
        raise InputError(f"plot: {sweeps[0]} is of a sweep, whose figures are its own; plot it by itself")
    drawn = draw_sweep(config, sweeps[0]) if sweeps else draw_runs(config, folders)
    for path in drawn:
        say(console, str(path))


def folder_of(path: Path, results: Path) -> Path:
    """The folder of results that a path or a run's name means: the one that holds records."""
    candidates = [path, results / path]
    found = [folder for folder in candidates if any((folder / name).is_file() for name in RECORDS)]
    return found[0] if found else path if path.is_dir() and not (results / path).exists() else results / path


def draw_runs(config: PlotConfig, folders: list[Path]) -> list[Path]:
    """Draw runs and masks; several of them into a folder named by all, so that no others' figures are lost."""
    edits = [path for path in folders if (path / "report.csv").is_file()]  # runs of `editing`: draw their masks
    masks = [*config.masks, *(RunPaths(path.parents[1], path.name).mask for path in edits)]
    runs = [path for path in folders if path not in edits]
    names = [path.resolve().name for path in folders] or draw.mask_names(masks)
    folder = draw.name_together(names) if config.name is None else plain_name("--name", config.name)
    return draw.plot_all(runs, masks, edits, config.output_dir / "plots" / folder)


def draw_sweep(config: PlotConfig, folder: Path) -> list[Path]:
    """Draw the figures of a sweep's finished runs, as its grid has them now.

    Raises InputError where there is no such grid, or none of its runs is finished.
    """
    root, name = folder.resolve().parents[1], folder.resolve().name
    with (folder / "cells.csv").open(encoding="utf-8", newline="") as lines:
        seeds = sorted({int(line["seed"]) for line in csv.DictReader(lines)})
    cells = expand(name, read_grid(name), {"output_dir": str(root)}, seeds)
    results = [read_result(cell) for cell in cells if cell.paths.finished]
    if not results:
        raise InputError(
            f"plot: no run of the grid {name!r} is finished in {root / 'results'}; `fedtalos sweep` runs it"
        )
    plots_dir = config.output_dir / "plots" / (name if config.name is None else plain_name("--name", config.name))
    return plot_grid(name, results, plots_dir)
