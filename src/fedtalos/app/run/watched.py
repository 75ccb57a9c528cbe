"""A run as another process, or a sweep, sees it: one line from its records, read anew every second."""

import math

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from fedtalos.app.run.display import OneLine
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.runs import Run, read_run
from fedtalos.app.run.units import duration, percent
from fedtalos.errors import printable


def progress_in_words(run: Run) -> str:
    """Describe where a run is: unit, loss, best accuracy and time left.

    >>> progress_in_words(read_run(RunPaths(Path(), "dense")))
    'round 5/30, loss 0.547, best 83.9 %, 2.5 min left'
    """
    if not run.done:
        return "beginning"
    known = [f"{run.unit} {run.done}/{run.total}"]
    if not math.isnan(run.loss):
        known.append(f"loss {run.loss:.3f}")
    if not math.isnan(run.best):
        known.append(f"best {percent(run.best)}")
    if not math.isnan(run.left):
        known.append(f"{duration(run.left)} left")
    return ", ".join(known)


class _Words(ProgressColumn):
    max_refresh = 1.0  # seconds

    def __init__(self, title: str, paths: RunPaths) -> None:
        super().__init__()
        self._title, self._paths = title, paths

    def render(self, task: Task) -> Text:
        words = f"{printable(self._title)}: {progress_in_words(read_run(self._paths))}"
        return Text(words, no_wrap=True, overflow="ellipsis")


def line_of(console: Console, title: str, paths: RunPaths) -> OneLine:
    """Make a line that shows where a run is, as long as it lasts.

    >>> with line_of(Console(), "dense", RunPaths(Path(), "dense")):
    ...     train()
    """
    line = OneLine(_Words(title, paths), console=console)
    line.add_task("", total=None)
    return line
