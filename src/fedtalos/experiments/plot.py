"""The plot command: read what runs and masks left behind, draw every figure that it allows."""

from pathlib import Path

from matplotlib.figure import Figure

from fedtalos.app.config.tools import PlotConfig
from fedtalos.app.figures.draw import _of_iterations, _of_masks, _of_run, _of_runs, write_figures
from fedtalos.app.run.folders import RunPaths, plain_name
from fedtalos.errors import InputError


def run(config: PlotConfig) -> list[Path]:
    """Draw what the command line asks for; returns the files."""
    if not config.runs and not config.masks:
        raise InputError("plot: expected runs or --masks, got neither; name a run under results/ or a mask file")
    folders = [path if path.is_dir() else config.output_dir / "results" / path for path in config.runs]
    edits = [path for path in folders if (path / "report.csv").is_file()]  # runs of `editing`: draw their masks
    masks = [*config.masks, *(RunPaths(path.parents[1], path.name).mask for path in edits)]
    runs = [path for path in folders if path not in edits]
    name = folders[0].resolve().name if len(folders) == 1 else "comparison" if folders else "masks"
    plots_dir = config.output_dir / "plots" / (name if config.name is None else plain_name("--name", config.name))
    drawn: dict[str, Figure] = {}
    if runs:
        drawn |= _of_run(runs[0]) if len(runs) == 1 else _of_runs(runs)
    if masks:
        drawn |= _of_masks(masks)
    for edit in edits:
        drawn |= _of_iterations(edit)
    return write_figures(drawn, plots_dir)
