"""Draw the figures of one run, of several compared, of a sweep, and of masks."""

from pathlib import Path

from rich.console import Console

from fedtalos.app.config.tools import PlotConfig
from fedtalos.app.figures import draw
from fedtalos.app.report.grid import read_grid_results
from fedtalos.app.run.display import say
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.app.run.runs import is_sweep, run_folder
from fedtalos.app.sweep.grid import read_grid
from fedtalos.app.sweep.plots import plot_grid
from fedtalos.errors import InputError


def run(config: PlotConfig, console: Console) -> None:
    """Draw every figure that the named runs and masks allow, into one folder under plots/; print the files."""
    if not config.runs and not config.masks:
        raise InputError("plot: expected runs or --masks, got neither; name a run under results/ or a mask file")
    folders = [run_folder(path, config.output_dir / "results") for path in config.runs]
    sweeps = [path for path in folders if is_sweep(path)]
    if sweeps and (len(folders) > 1 or config.masks):
        raise InputError(f"plot: {sweeps[0]} is of a sweep, whose figures are its own; plot it by itself")
    drawn = draw_sweep(config, sweeps[0]) if sweeps else draw_runs(config, folders)
    if not drawn:
        say(console, "nothing to draw: three points or fewer, which `fedtalos compare` and `fedtalos runs` print")
    for path in drawn:
        say(console, str(path))


def draw_runs(config: PlotConfig, folders: list[Path]) -> list[Path]:
    """Draw runs and masks; several of them into a folder named by all, so that no others' figures are lost."""
    edits = [path for path in folders if (path / "report.csv").is_file()]  # runs of `editing`: draw their masks
    masks = [*config.masks, *(RunPaths(path.parents[1], path.name).mask for path in edits)]
    runs = [path for path in folders if path not in edits]
    names = [path.resolve().name for path in folders] or draw.mask_names(masks)
    folder = draw.name_together(names) if config.name is None else plain_name("--name", config.name)
    return draw.plot_all(runs, masks, edits, config.output_dir / "plots" / folder, config.format)


def draw_sweep(config: PlotConfig, folder: Path) -> list[Path]:
    """Draw the figures of a sweep's finished runs, as its grid has them now.

    Raises InputError where there is no such grid, or none of its runs is finished.
    """
    name, results = read_grid_results(folder)
    plots_dir = config.output_dir / "plots" / (name if config.name is None else plain_name("--name", config.name))
    return plot_grid(name, results, plots_dir, read_grid(name).names, config.format)
