"""List runs with how they stand, or follow one that another terminal works on: `runs`, and `status` for short."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtalos.app.config.watching import RunsConfig
from fedtalos.app.run.display import is_live, print_whole, say
from fedtalos.app.run.runs import Run, all_runs, named_run, read_run
from fedtalos.app.run.units import duration, percent
from fedtalos.app.run.watched import line_of, progress_in_words
from fedtalos.errors import InputError, printable

NEWEST = 20
"""Runs that are listed without --all."""
SECONDS = 1.0
"""From one look at a run that is followed to the next."""


def run(config: RunsConfig, console: Console) -> None:
    """Print a line for each run, the newest first, or follow one to its end.

    Raises InputError for a name that is no run's.
    """
    every = [named_run(path, config.output_dir) for path in config.runs] or all_runs(config.output_dir)
    if config.follow:
        follow(the_one([read_run(paths) for paths in every], named=bool(config.runs)), console)
        return
    shown = every if config.all or config.runs else every[:NEWEST]
    if not shown:
        say(console, f"no runs in {config.output_dir / 'results'}; `fedtalos demo` makes some")
        return
    (Console.print if console.is_terminal else print_whole)(console, table([read_run(paths) for paths in shown]))
    if len(shown) < len(every):
        say(console, f"{len(every) - len(shown)} older runs; --all lists them too")


def the_one(runs: Sequence[Run], *, named: bool) -> Run:
    """The run to follow: the one named, else the only one that is running. InputError where that is not clear."""
    if named and len(runs) > 1:
        raise InputError(f"follow: expected one run, got {len(runs)}; name the one")
    if named:
        return runs[0]
    running = [run for run in runs if run.state == "running"]
    if len(running) == 1:
        return running[0]
    there = ", ".join(run.paths.name for run in running[:8]) or "none"
    raise InputError(f"follow: expected the name of a run; running are: {there}")


def table(runs: Sequence[Run]) -> Table:
    """Make a table of runs: state, progress, best accuracy on validation, test accuracy, time taken and left."""
    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    made.add_column("run", overflow="fold")
    for heading in ("command", "state"):
        made.add_column(heading, no_wrap=True)
    for heading in ("done", "best val", "test", "took", "left"):
        made.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        done = f"{run.done}/{run.total}" if run.total else ""
        left = "" if math.isnan(run.left) else duration(run.left)
        accuracies = (percent(run.best), percent(run.test))
        cells = (run.command, run.state, done, *accuracies, duration(run.seconds) if run.seconds else "", left)
        made.add_row(Text(printable(run.paths.name)), *map(Text, cells))
    return made


def follow(run: Run, console: Console) -> None:
    """Show a run until no process works on it: in one line on a terminal, elsewhere a line per step."""
    paths, said = run.paths, -1
    with line_of(console, paths.name, paths) if is_live(console) else nullcontext():
        while run.state == "running":
            if not is_live(console) and run.done != said:
                say(console, f"{paths.name}: {progress_in_words(run)}")
                said = run.done
            time.sleep(SECONDS)
            run = read_run(paths)
    console.print(table([run]))
