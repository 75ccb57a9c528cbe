"""Display of a run while it runs: a live line on a terminal, plain lines elsewhere."""

import logging
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, HighlighterType, JustifyMethod, OverflowMethod, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from fedtalos.errors import printable
from fedtalos.metrics import Metrics
from fedtalos.notes import noted
from fedtalos.training.editing.describe import KINDS, DensityRow

T = TypeVar("T")


def say(console: Console, text: str) -> None:
    """Print ``text`` as it is: not wrapped, so that paths can be copied, not coloured, nothing in it read as markup.

    Characters that a terminal would act on, or cannot show, are spelled out: names in files may come from strangers.

    >>> say(Console(), "plots/mine/accuracy.png")
    plots/mine/accuracy.png
    """
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def say_notes(console: Console) -> dict[str, str]:
    """Print what was decided for the user since notes were last taken, and give it.

    >>> say_notes(Console())
    images: 3 of 140 files are no images and were left out: notes.txt, ...
    """
    decided = noted()
    for what, sentence in decided.items():
        say(console, f"{what}: {sentence}")
    return decided


def say_pairs(console: Console, title: str, values: NDArray[np.float64], in_brackets: NDArray[np.float64]) -> None:
    """Print two numbers for every two of several things, (M, M) each; so many columns at a time that a line holds them.

    >>> say_pairs(Console(), "Cosines, in brackets overlaps", cosines, overlaps)
    """
    say(console, title)
    for first in range(0, len(values), 5):
        columns = range(first, min(first + 5, len(values)))
        say(console, f"{'':>5}" + "".join(f"{column + 1:>6}{'':>7}" for column in columns).rstrip())
        for row in range(len(values)):
            said = [f"{values[row, column]:>6.2f} ({in_brackets[row, column]:.2f})" for column in columns]
            if row in columns:
                said[row - first] = f"{values[row, row]:>6.2f}{'':>7}"  # beside itself
            say(console, f"{row + 1:>5}" + "".join(said).rstrip())


class PlainConsole(Console):
    """A console that prints text as it is, in tables too: nothing in it is markup, or acted on by a terminal.

    >>> PlainConsole().print("[red]\\x1b[2J")
    [red]\\x1b[2J
    """

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: HighlighterType | None = None,
    ) -> Text:
        return super().render_str(
            printable(text),
            style=style,
            justify=justify,
            overflow=overflow,
            emoji=False,
            markup=False,
            highlight=highlight,
            highlighter=highlighter,
        )


def print_whole(console: Console, table: Table) -> None:
    """Print a table as wide as it wants to be: no number is cut off, and a pipe gets whole names.

    >>> print_whole(Console(), norm_report(norm_table(vector)))
    """
    table.width = table.__rich_measure__(console, console.options.update(width=10_000)).maximum
    console.print(table, crop=False)


def say_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Print a few facts as two columns that keep to the terminal's width.

    >>> say_facts(Console(), {"device": "cpu, fp32", "data": "digits, 10 classes"})
    device  cpu, fp32
    data    digits, 10 classes
    """
    column = max(map(len, facts), default=0) + 2
    for name, fact in facts.items():
        wrapped = textwrap.wrap(
            printable(fact), max(20, console.width - column), break_long_words=False, break_on_hyphens=False
        )
        say(console, name.ljust(column) + ("\n" + " " * column).join(wrapped))


def is_live(console: Console) -> bool:
    """Tell whether a bar can be drawn anew in its place: on terminals, but not where TERM is dumb."""
    return console.is_terminal and not console.is_dumb_terminal


class _Warnings(logging.Handler):
    """Prints the library's warnings as lines of their own."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self._console, record.getMessage())


@contextmanager
def warnings_shown(console: Console) -> Iterator[None]:
    """Print what the library warns of inside, such as batches that do not fit into memory.

    >>> with warnings_shown(Console(stderr=True)):
    ...     list(fedavg(model, clients, local=local, rounds=1))
    """
    handler, log = _Warnings(console), logging.getLogger("fedtalos")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class OneLine(Progress):
    """A bar that never fills its line, and is gone when it ends.

    A terminal puts its own ^C at the line's end. In a full line that would begin another one, and copies of the bar
    would stay.
    """

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        self._terminal = console  # it is asked for before rich has put it in its place
        super().__init__(*columns, console=console, transient=True)

    def get_renderable(self) -> RenderableType:
        """The bar, a few columns narrower than the terminal."""
        return Constrain(super().get_renderable(), max(20, self._terminal.width - 4))


class Display:
    """Progress over ``total`` epochs, rounds or iterations, of which ``done`` were done before."""

    def __init__(self, console: Console, unit: str, total: int, done: int = 0) -> None:
        self._console, self._unit, self._total, self._first = console, unit, total, done
        self._start, self._images = time.perf_counter(), 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._unsaid = ""

    def __enter__(self) -> Self:
        if is_live(self._console):
            self._progress = OneLine(
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                TextColumn(
                    "{task.fields[figures]}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                f"{self._unit} {self._first}/{self._total}", total=self._total, completed=self._first, figures=""
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
            if self._unsaid:  # the bar is gone, so what it said last is left as a line
                self._console.print(self._unsaid, highlight=False)

    def watch(self, items: Iterable[T], share: float) -> Iterator[T]:
        """Pass ``items`` on; each one is ``share`` of the present epoch, round or iteration."""
        for item in items:
            yield item
            if self._progress is not None and self._task is not None:
                self._progress.advance(self._task, share)

    @contextmanager
    def step(self, what: str, images: int) -> Iterator[Callable[[int], None]]:
        """Show that ``what`` is under way instead of the last figures; takes how many images are done, as they are.

        >>> with display.step("validating", 5000) as advance:
        ...     advance(250)
        """
        done, before = 0, "" if self._progress is None else self._progress.tasks[0].fields["figures"]

        def show(figures: str) -> None:
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, figures=figures)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(f"{what}, {100 * done // max(images, 1)} %")

        show(what)
        try:
            yield advance
        finally:
            show(before)

    def finished(self, number: int, train: Metrics, validation: Metrics | None) -> None:
        """Epoch or round ``number`` is done with these figures; on a terminal only validations leave a line."""
        self._images += train.examples
        rate = f"{self._images / (time.perf_counter() - self._start):.0f} images/s"
        figures = f"train loss {train.loss:.3f}, accuracy {100 * train.accuracy:.1f} %"
        short = f"loss {train.loss:.3f}, {100 * train.accuracy:.1f} %, {rate}"
        if train.examples == 0:
            figures = short = "no client's update counted"
        if validation is not None:
            figures += f"; val loss {validation.loss:.3f}, accuracy {100 * validation.accuracy:.1f} %"
        if self._progress is None:
            figures += f"; {rate}"  # a terminal's bar says it
        self.show(number, figures, keep=validation is not None, short=short)

    def note(self, text: str) -> None:
        """Leave a line of what should not be missed."""
        say(self._console, text)

    def show(self, number: int, figures: str, *, keep: bool = True, short: str = "") -> None:
        """Epoch, round or iteration ``number`` is done; ``keep`` leaves a line of it on a terminal too.

        ``short`` is what the bar says where that is less than ``figures``.
        """
        name = f"{self._unit} {number}/{self._total}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=number, description=name, figures=short or figures)
            self._unsaid = "" if keep else f"{name}: {figures}"
            if keep:
                self._console.print(f"{name}: {figures}", highlight=False)
        else:
            seconds = time.perf_counter() - self._start
            left = seconds / (number - self._first) * (self._total - number)
            self._console.print(f"{name}: {figures}; ETA {left:.0f} s", highlight=False, soft_wrap=True)


def density_report(rows: Sequence[DensityRow]) -> Table:
    """Per cent of entries that may move, by block and kind, and over all blocks."""
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    table = Table(title="Entries that may move (%)", title_justify="left")
    table.add_column("block", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for block, place in sorted({(row.block, row.place) for row in rows}):
        by_kind = {row.kind: f"{100 * row.density:.1f}" for row in rows if row.block == block}
        table.add_row(place, *(by_kind.get(kind, "") for kind in kinds))
    table.add_section()
    overall = [[row for row in rows if row.kind == kind] for kind in kinds]
    shares = [100 * sum(r.active for r in same) / sum(r.entries for r in same) for same in overall]
    table.add_row("all", *(f"{share:.1f}" for share in shares))
    return table
