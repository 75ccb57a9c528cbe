"""Words at the end of a run: a table of what it reached, what it cost, its files, and the commands that come next."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtalos.app.config.schema import CentralizedConfig, FederatedConfig
from fedtalos.app.run.display import say, say_facts
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.progress import Progress
from fedtalos.app.run.runs import comparable
from fedtalos.app.run.units import duration, megabytes, percent, thousands
from fedtalos.metrics import wilson
from fedtalos.training.masked_parameters import MaskedParameters


@dataclass(frozen=True)
class Reached:
    """Accuracy on a split's images, 0 to 1: of the last model, and of the one that was best on validation."""

    last: float
    best: float
    examples: int


def say_end(
    console: Console,
    paths: RunPaths,
    summary: Mapping[str, Any],
    reached: Mapping[str, Reached],
    files: Sequence[Path],
    progress: Progress,
    unit: str,
    to_try: str,
) -> None:
    """Print what a run ``reached`` by split, what it cost, its files, what ``to_try`` where it lost, what is next."""
    console.print(table_of(reached, f"{unit} {progress.best}"))
    counts = " and ".join(thousands(figures.examples) for figures in reached.values())
    costs = costs_of(summary["seconds"], progress.evaluation_seconds, progress.images, summary.get("megabytes_sent"))
    say_facts(console, {"in brackets": f"95 % interval, by the {counts} images", **costs})
    for path in files:
        say(console, str(path))
    if warning := loss_of(progress, unit, to_try):
        say(console, warning)
    say_next(console, paths, next_commands(summary["command"], paths, comparable(paths)))


def table_of(reached: Mapping[str, Reached], best: str) -> Table:
    """Make a table of accuracies, of the last model and of the one best on validation, which ``best`` names."""
    same = all(figures.last == figures.best for figures in reached.values())
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("accuracy")
    for heading in [f"last, best on validation ({best})"] if same else ["last", f"best on validation ({best})"]:
        table.add_column(heading, overflow="fold")
    for split, figures in reached.items():
        shares = [figures.last] if same else [figures.last, figures.best]
        table.add_row(split, *(with_interval(share, figures.examples) for share in shares))
    return table


def stopped_early(progress: Progress, unit: str, total: int) -> str:
    """Say that --early_stop ended a run, and when."""
    stale = f"{progress.stale} validation{'' if progress.stale == 1 else 's'}"
    return f"stopped early at {unit} {progress.done} of {total}: nothing better for {stale}"


def loss_of(progress: Progress, unit: str, to_try: str) -> str:
    """Say where training made the model worse, and what ``to_try``; empty where it did not."""
    if progress.start_accuracy < 0 or progress.done == 0:
        return ""
    if progress.val_accuracy >= progress.start_accuracy and progress.best > 0:
        return ""
    return (
        f"training did not help: validation accuracy was {percent(progress.start_accuracy)} at the start, "
        f"and is {percent(progress.val_accuracy)} at the end (best: {unit} {progress.best}); "
        f"try {to_try}"
    )


def what_to_try(config: CentralizedConfig | FederatedConfig, moving: MaskedParameters) -> str:
    """List options that may help a run whose training did not.

    >>> what_to_try(CentralizedConfig(), MaskedParameters(model))
    'a lower --learning_rate, or --freeze_head'
    """
    options = ["a lower --learning_rate"]
    if isinstance(config, FederatedConfig) and config.aggregation.dp_noise:
        options.insert(0, "less --dp_noise")
    if "head.weight" in moving.parameters and config.train.trainable != "head":
        options.append("--freeze_head")
    if isinstance(config, FederatedConfig) and not config.apart.one_shot:
        options.append("fewer steps between rounds")
    return ", or ".join([", ".join(options[:-1]), options[-1]]) if options[1:] else options[0]


def with_interval(share: float, examples: int) -> Text:
    """An accuracy, and its 95 % interval in brackets.

    >>> print(with_interval(0.9, 100))
    90.0 % (82.6 to 94.5)
    """
    low, high = wilson(share, examples)
    return Text(f"{percent(share)} ({100 * low:.1f} to {100 * high:.1f})")


def costs_of(
    seconds: float, evaluation_seconds: float, images: int, sent: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Tell what a run cost, by topic; ``sent`` are megabytes down and up.

    >>> costs_of(20.0, 2.0, 36_000)
    {'took': '20 s, 10 % of it to evaluate; 2 000 images/s'}
    """
    rate = images / max(seconds - evaluation_seconds, 1e-9)
    share = 100 * evaluation_seconds / max(seconds, 1e-9)
    return _sent(sent) | {"took": f"{duration(seconds)}, {share:.0f} % of it to evaluate; {thousands(rate)} images/s"}


def _sent(megabytes_sent: Mapping[str, float] | None) -> dict[str, str]:
    if megabytes_sent is None:
        return {}
    down, up = (megabytes(1e6 * megabytes_sent[way]) for way in ("down", "up"))
    return {"sent": f"{down} down, {up} up, all clients together"}


def end_of_edit(active: int, eligible: int, seconds: float, sent: Mapping[str, float] | None) -> dict[str, str]:
    """Tell what an edit came to and cost, by topic.

    >>> end_of_edit(66_995, 670_464, 5.0, None)["may move"]
    '66 995 of 670 464 eligible entries, 10.0 %'
    """
    share = percent(active / eligible if eligible else math.nan)
    moves = f"{thousands(active)} of {thousands(eligible)} eligible entries, {share}"
    return {"may move": moves, **_sent(sent), "took": duration(seconds)}


def say_next(console: Console, paths: RunPaths, commands: Mapping[str, str]) -> None:
    """Print the commands that make sense now, each with what it is for.

    >>> say_next(Console(), paths, {"plot dense sparse": "draw both"})
    next:
      fedtalos plot dense sparse   # draw both
    """
    if not commands:
        return
    say(console, "next:")
    width = max(len(command) for command in commands) + len(paths.flag)
    for command, purpose in commands.items():
        say(console, f"  fedtalos {(command + paths.flag).ljust(width)}   # {purpose}")


def next_commands(command: str, paths: RunPaths, other: str | None) -> dict[str, str]:
    """Commands that go on from a trained run, with what they are for; ``other`` is a run to compare it with."""
    name, other = quote(paths.name), None if other is None else quote(other)  # as a shell reads them
    found = {f"predict {name} IMAGE": "what it sees in a picture of yours"}
    if other is not None:
        found[f"compare {other} {name}"] = "figures and options side by side"
        found[f"plot {other} {name}"] = "their curves in one figure"
    if command == "centralized":
        found[f"federated --weights {name} ..."] = "let clients go on from this model"
    return found
