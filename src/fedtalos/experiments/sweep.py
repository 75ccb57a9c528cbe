"""Run a named grid of runs, then write its table and draw its figures; stopped, it goes on with the same command."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Literal

from rich.console import Console

from fedtalos.app.config.files import flatten, override, read_yaml
from fedtalos.app.config.schema import RunConfig
from fedtalos.app.config.tools import SweepConfig
from fedtalos.app.report.grid import is_training, report_of_grid
from fedtalos.app.report.page import write_report
from fedtalos.app.run.display import say
from fedtalos.app.run.folders import AlreadyFinished
from fedtalos.app.run.interruption import Interrupted
from fedtalos.app.run.launch import check_alone
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import write_yaml
from fedtalos.app.run.resume import MAY_DIFFER, saved_options
from fedtalos.app.run.units import duration
from fedtalos.app.sweep.estimate import estimate
from fedtalos.app.sweep.grid import Cell, expand, read_grid, with_needs
from fedtalos.app.sweep.growing import GrowingTable
from fedtalos.app.sweep.plots import check_data, check_lines, plot_grid
from fedtalos.app.sweep.tables import over_seeds, print_table, read_result, write_tables
from fedtalos.errors import InputError, TrainingError, shown
from fedtalos.files import refuse_link, remove_leftovers

State = Literal["finished", "unfinished", "to do"]
GIVEN = ("weights", "output_dir", "data_dir", "device", "precision", "threads", "workers")


def run(config: SweepConfig, console: Console) -> None:
    """Run what is not finished, one run after another, then write the table and draw the figures.

    A run that fails is noted, and its traceback kept; the others go on. Raises InputError before the first of them
    starts where any is not valid or was run with other options, and TrainingError at the end where any failed.
    """
    check_alone(config.command)
    grid = read_grid(config.grid)
    cells = expand(config.grid, grid, given(config), config.seeds)
    check_lines(cells)
    check_data(cells)
    chosen = cells if config.only is None else with_needs(cells, config.only)
    folder = RunPaths(config.output_dir, config.grid)
    if folder.config.exists():
        raise InputError(f"{folder.results} is a run, where the sweep's table is to be; move it away")
    states = {cell.name: state(cell, folder.results) for cell in cells}
    finished = [cell for cell in cells if states[cell.name] == "finished"]
    if config.dry_run:
        show_plan(chosen, finished, states, console)
        return
    for place in (folder.results, folder.plots):
        refuse_link(place)
        remove_leftovers(place)
    for cell in cells:
        if states[cell.name] == "finished":  # it may have been killed before its log was taken away
            _log_path(cell, folder.results).unlink(missing_ok=True)
    to_do = [cell for cell in chosen if states[cell.name] != "finished"]
    say(console, f"{config.grid}: {len(chosen) - len(to_do)} of {len(chosen)} runs are finished")
    failed = run_all(to_do, states, folder.results, console, again=f"fedtalos sweep {config.grid}")
    written = report([cell for cell in cells if cell.paths.finished], folder, grid.names, console)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(chosen)} runs failed or were left out ({', '.join(failed)}); {folder.results} has "
            "their tracebacks, and the same command tries them again"
        )
    for path in written:
        say(console, str(path))


def given(config: SweepConfig) -> dict[str, object]:
    """Options of runs that flags of the sweep set; they beat the grid's."""
    return {key: value for key in GIVEN if (value := getattr(config, key)) is not None}


def show_plan(cells: Sequence[Cell], finished: Sequence[Cell], states: dict[str, State], console: Console) -> None:
    """List runs with their states, and how long the others will take by the ``finished`` ones of the grid."""
    results = [read_result(cell) for cell in finished]
    to_do = [cell for cell in cells if states[cell.name] != "finished"]
    estimates = {cell.name: seconds for cell in to_do if (seconds := estimate(cell, results)) is not None}
    for cell in cells:
        about = f", about {duration(estimates[cell.name])}" if cell.name in estimates else ""
        say(console, f"{cell.name}  {states[cell.name]}{about}")
    total = f"{len(to_do)} of {len(cells)} runs to do"
    if not to_do:
        say(console, total)
    elif not estimates:
        say(console, f"{total}; an estimate comes once a run like them is finished")
    else:
        unknown = len(to_do) - len(estimates)
        but = f" without {unknown} of them, which are like no finished run" if unknown else ""
        say(console, f"{total}, about {duration(sum(estimates.values()))}{but}")


def report(finished: Sequence[Cell], folder: RunPaths, names: Mapping[str, str], console: Console) -> list[Path]:
    """Write and print the table of the finished runs, and draw the figures; return the files."""
    if not finished:
        return []
    results = [read_result(cell) for cell in finished]
    rows = over_seeds(results)
    written = write_tables(results, rows, folder.results)
    print_table(rows, f"{folder.name}: mean ± standard deviation over seeds", console)
    written += plot_grid(folder.name, results, folder.plots, names)
    if any(is_training(row.cell) for row in rows):
        written.append(write_report(folder.plots / "report.html", report_of_grid(folder.name, results)))
    return written


def state(cell: Cell, folder: Path) -> State:
    """Find out where a run stands. InputError where it was started with other options than the grid asks for now."""
    if not cell.paths.config.exists():
        return "to do"
    recipe = _recipe_path(cell, folder)
    if not recipe.exists():
        raise InputError(f"{cell.paths.results} was not made by this sweep, which wants its name; move it away")
    was = read_yaml(recipe)
    for name, now in cell.recipe.items():
        before = was.get(name, {})
        if not isinstance(before, dict):
            raise InputError(f"{recipe}: expected the options of {name}; move the run away, and make it anew")
        for key in [*now, *before]:
            if now.get(key) != before.get(key):
                old, new = (options.get(key, "its default") for options in (before, now))
                raise InputError(
                    f"{cell.name} was run with {key} {shown(old)} of {name}, now the grid asks for {shown(new)}; "
                    "ask for what it was (flags included), take another --output_dir, or move the run away from "
                    "results, checkpoints, masks and plots"
                )
    return "finished" if cell.paths.finished else "unfinished"


def run_all(
    cells: Sequence[Cell], states: dict[str, State], folder: Path, console: Console, *, again: str
) -> list[str]:
    """Run cells in order; return the names of those that failed, or lack a run that they need."""
    failed: list[str] = []
    growing = GrowingTable(cells, console)
    for number, cell in enumerate(cells, start=1):
        lacking = [need.name for need in cell.needs if not need.paths.finished]
        if lacking:
            growing.note(number, cell, f": left out, for it needs {lacking[0]}, which failed")
            failed.append(cell.name)
            continue
        write_yaml(_recipe_path(cell, folder), cell.recipe)
        try:
            with growing.running(number, cell, _log_path(cell, folder)) as quiet, suppress(AlreadyFinished):
                run_one(resumed(cell) if states[cell.name] == "unfinished" else cell.config, quiet)
            growing.add(number, cell)
        except BrokenPipeError:  # nobody is left to read
            raise
        except (Interrupted, KeyboardInterrupt):
            say(console, f"{again} goes on with the grid")
            raise
        except Exception as error:
            what = str(error) if isinstance(error, InputError | TrainingError) else f"{type(error).__name__}: {error}"
            growing.note(number, cell, f" failed: {what}")
            failed.append(cell.name)
    return failed


def run_one(config: RunConfig, console: Console) -> None:
    """Run one cell, as its own command would."""
    import_module(f"fedtalos.experiments.{config.command}").run(config, console)


def resumed(cell: Cell) -> RunConfig:
    """The config to go on with: as the run settled it when it began, but for what may be given anew."""
    now = {key: value for key, value in flatten(cell.config).items() if key in MAY_DIFFER}
    options = {**saved_options(cell.paths, cell.config.command), **now, "resume": True}
    return override(type(cell.config)(), options, str(cell.paths.config))


def _log_path(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.log"


def _recipe_path(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.yaml"
