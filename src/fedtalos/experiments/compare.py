"""Compare runs: what they reached and cost, side by side, and the options in which they differ."""

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.watching import CompareConfig
from fedtalos.app.run.display import say, say_facts
from fedtalos.app.run.ending import with_interval
from fedtalos.app.run.resume import MAY_DIFFER
from fedtalos.app.run.runs import Run, check_one_data_set, named_run, read_run
from fedtalos.app.run.units import duration, megabytes, percent
from fedtalos.errors import InputError, printable
from fedtalos.training.editing.describe import differences

OF_NO_INTEREST = {"command", "made_by", *MAY_DIFFER} - {"device", "precision"}
"""Keys of config.yaml that say where a run was, not what it was."""
MADE_BY = ("commit", "fedtalos", "torch")


def run(config: CompareConfig, console: Console) -> None:
    """Print a table of figures, then the options that differ, by the numbers of the runs.

    Raises InputError for fewer than two runs, for edits, and for runs of different images.
    """
    if len(config.runs) < 2:
        raise InputError(f"compare: expected two or more runs, got {len(config.runs)}; `fedtalos runs` lists them")
    every = [named_run(path, config.output_dir) for path in config.runs]
    names = [paths.results.resolve() for paths in every]
    if len(set(names)) < len(names):
        raise InputError("compare: expected different runs, got one of them twice; leave it out")
    check_one_data_set([paths.results for paths in every])
    runs = [read_run(paths) for paths in every]
    for found in runs:
        if found.state == "broken":
            raise InputError(f"{found.paths.results}: its records cannot be read; leave it out")
        if found.command == "editing":
            raise InputError(
                f"{found.paths.name} is an edit, without accuracies; `fedtalos mask compare` compares masks"
            )
    console.print(table(runs))
    differing = differences(options_of_all(runs))
    say(console, "Made differently (by which runs):" if differing else "Made differently: nothing")
    say_facts(console, differing)


def table(runs: Sequence[Run]) -> Table:
    """Make a table of figures: accuracies, megabytes, time, and the state of what is not finished."""
    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    made.add_column("", justify="right")
    made.add_column("run", overflow="fold")
    for heading in ("best val", "test (95 % interval)", "sent", "took", "done"):
        made.add_column(heading, justify="right", no_wrap=True)
    for number, run in enumerate(runs, 1):
        test = Text("-") if math.isnan(run.test) else with_interval(run.test, run.tested)
        sent = megabytes(run.sent) if run.sent else "-"
        done = f"{run.done}/{run.total}" + ("" if run.state == "finished" else f" {run.state}")
        name, best, took = Text(printable(run.paths.name)), percent(run.best), duration(run.seconds)
        made.add_row(str(number), name, best, test, sent, took, done)
    return made


def options_of_all(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Each run's options, less those that another run's command does not have."""
    had: dict[str, set[str]] = {}
    made = [options(run) for run in runs]
    for run, found in zip(runs, made, strict=True):
        had.setdefault(run.command, set()).update(found)
    common = set.intersection(*had.values())
    return [{key: value for key, value in found.items() if key in common} for found in made]


def options(run: Run) -> dict[str, str]:
    """The options that make a run what it is, and the code that made it."""
    config: dict[str, Any] = read_yaml(run.paths.config)
    made_by = config.get("made_by")
    found = {key: value for key, value in config.items() if key not in OF_NO_INTEREST}
    found |= {key: made_by.get(key) for key in MADE_BY} if isinstance(made_by, dict) else {}
    return {"command": run.command} | {key: "none" if value is None else str(value) for key, value in found.items()}
