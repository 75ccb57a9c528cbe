"""Draw the figures of one run, or of several compared, and of masks."""

from rich.console import Console

from fedtalos.app.config.tools import PlotConfig
from fedtalos.app.figures import draw
from fedtalos.app.run.display import say
from fedtalos.app.run.folders import RunPaths, plain_name
from fedtalos.errors import InputError


def run(config: PlotConfig, console: Console) -> None:
    """Draw every figure that the named runs and masks allow, into one folder under plots/; print the files."""
    if not config.runs and not config.masks:
        raise InputError("plot: expected runs or --masks, got neither; name a run under results/ or a mask file")
    folders = [path if path.is_dir() else config.output_dir / "results" / path for path in config.runs]
    edits = [path for path in folders if (path / "report.csv").is_file()]  # runs of `editing`: draw their masks
    masks = [*config.masks, *(RunPaths(path.parents[1], path.name).mask for path in edits)]
    runs = [path for path in folders if path not in edits]
    name = folders[0].resolve().name if len(folders) == 1 else "comparison" if folders else "masks"
    plots_dir = config.output_dir / "plots" / (name if config.name is None else plain_name("--name", config.name))
    for path in draw.plot_all(runs, masks, edits, plots_dir):
        say(console, str(path))
