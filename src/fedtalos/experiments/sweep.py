"""The sweep command: run what is not finished of a grid, then write its table and draw its figures."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.schema import RunConfig
from fedtalos.app.config.tools import SweepConfig
from fedtalos.app.run import launch as processes
from fedtalos.app.run.folders import RunPaths
from fedtalos.app.run.interruption import Interrupted
from fedtalos.app.run.recorder import write_yaml
from fedtalos.app.sweep.estimates import Estimator
from fedtalos.app.sweep.grid import Cell, expand, read_grid, with_needs
from fedtalos.app.sweep.plots import check_lines, plot_grid
from fedtalos.app.sweep.tables import over_seeds, print_table, read_result, write_tables
from fedtalos.errors import InputError
from fedtalos.files import write_atomic
from fedtalos.training.loop import TrainingError

State = Literal["finished", "unfinished", "to do"]
RunOne = Callable[[RunConfig, Console], None]
GIVEN = ("weights", "output_dir", "data_dir", "device", "precision", "threads", "workers")


def run(config: SweepConfig, console: Console, run_one: RunOne) -> list[Path]:
    """Run what is not finished, one by one with ``run_one``, then report; returns the table's and figures' files.

    A run that fails is noted, and its traceback kept; the others go on. Raises InputError before the first of them
    starts where any is not valid or was run with other options, and TrainingError at the end where any failed.
    """
    processes.check_alone(config.command)
    grid = read_grid(config.grid)
    cells = expand(config.grid, grid, given(config), config.seeds)
    check_lines(cells)
    chosen = cells if config.only is None else with_needs(cells, config.only)
    folder = RunPaths(config.output_dir, config.grid)
    if folder.config.exists():
        raise InputError(f"{folder.results} is a run, where the sweep's table is to be; move it away")
    states = {cell.name: state(cell, folder.results) for cell in cells}
    if config.dry_run:
        if (threads := chosen[0].config.run.threads) is not None:
            torch.set_num_threads(threads)
        show_plan(chosen, states, console)
        return []
    to_do = [cell for cell in chosen if states[cell.name] != "finished"]
    console.print(f"{config.grid}: {len(chosen) - len(to_do)} of {len(chosen)} runs are finished", highlight=False)
    failed = run_all(to_do, states, folder.results, console, run_one, again=f"fedtalos sweep {config.grid}")
    written = report([cell for cell in cells if cell.paths.finished], folder, console)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(chosen)} runs failed or were left out ({', '.join(failed)}); {folder.results} has "
            "their tracebacks, and the same command tries them again"
        )
    return written


def given(config: SweepConfig) -> dict[str, object]:
    """The options of runs that flags of the sweep set: they beat the grid's."""
    return {key: value for key in GIVEN if (value := getattr(config, key)) is not None}


def show_plan(cells: Sequence[Cell], states: dict[str, State], console: Console) -> None:
    """List the runs with their states, and estimates of those that are not finished."""
    estimator, total, unknown = Estimator(), 0.0, 0
    for cell in cells:
        line = f"{cell.name}  {states[cell.name]}"
        if states[cell.name] != "finished":
            seconds = estimator.seconds(cell)
            line += ", no estimate" if seconds is None else f", about {duration(seconds)}"
            total, unknown = total + (seconds or 0), unknown + (seconds is None)
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    left = sum(states[cell.name] != "finished" for cell in cells)
    about = "no estimate" if left == unknown > 0 else f"about {duration(total)} here"
    but = f" without {unknown} of them, which have no estimate" if 0 < unknown < left else ""
    console.print(f"{left} of {len(cells)} runs to do, {about}{but}", highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """In the unit that fits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def report(finished: Sequence[Cell], folder: RunPaths, console: Console) -> list[Path]:
    """Write and print the table of the finished runs, and draw the figures; returns the files."""
    if not finished:
        return []
    results = [read_result(cell) for cell in finished]
    rows = over_seeds(results)
    written = write_tables(results, rows, folder.results)
    print_table(rows, f"{folder.name}: mean ± standard deviation over seeds", console)
    return written + plot_grid(folder.name, results, folder.plots)


def state(cell: Cell, folder: Path) -> State:
    """Where a run stands. InputError where it was started with other options than the grid asks for now."""
    if not cell.paths.config.exists():
        return "to do"
    recipe = _recipe_path(cell, folder)
    if not recipe.exists():
        raise InputError(f"{cell.paths.results} was not made by this sweep, which wants its name; move it away")
    was = read_yaml(recipe)
    for run, now in cell.recipe.items():
        before = was.get(run, {})
        for key in [*now, *before]:
            if now.get(key) != before.get(key):
                old, new = (options.get(key, "its default") for options in (before, now))
                raise InputError(
                    f"{cell.name} was run with {key} {old!r} of {run}, now the grid asks for {new!r}; "
                    "ask for what it was (flags included), take another --output_dir, or move the run away from "
                    "results, checkpoints, masks and plots"
                )
    return "finished" if cell.paths.finished else "unfinished"


def run_all(
    cells: Sequence[Cell], states: dict[str, State], folder: Path, console: Console, run_one: RunOne, *, again: str
) -> list[str]:
    """Run them in order, and say which failed, or lack a run that they need."""
    failed: list[str] = []
    for number, cell in enumerate(cells, start=1):
        say = f"[{number}/{len(cells)}] {cell.name}"
        lacking = [need.name for need in cell.needs if not need.paths.finished]
        if lacking:
            console.print(f"{say}: left out, for it needs {lacking[0]}, which failed", highlight=False, markup=False)
            failed.append(cell.name)
            continue
        console.print(say, highlight=False, markup=False)
        write_yaml(_recipe_path(cell, folder), cell.recipe)
        log = folder / f"{cell.name}.log"
        log.unlink(missing_ok=True)
        try:
            run_one(_resumed(cell.config) if states[cell.name] == "unfinished" else cell.config, console)
        except BrokenPipeError:  # nobody is left to read
            raise
        except (Interrupted, KeyboardInterrupt):
            console.print(f"{again} goes on with the grid", highlight=False, markup=False)
            raise
        except Exception as error:
            write_atomic(log, traceback.format_exc())
            what = str(error) if isinstance(error, InputError | TrainingError) else f"{type(error).__name__}: {error}"
            console.print(f"{say} failed: {what}", highlight=False, markup=False, soft_wrap=True)
            failed.append(cell.name)
    return failed


def _resumed(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})


def _recipe_path(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.yaml"
