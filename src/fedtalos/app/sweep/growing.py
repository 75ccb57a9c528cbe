"""A sweep as it runs: a table that grows by a line per run, above a line of where the present run is."""

import io
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console

from fedtalos.app.run.bars import hidden
from fedtalos.app.run.display import is_live, say
from fedtalos.app.run.units import duration
from fedtalos.app.run.watched import line_of
from fedtalos.app.sweep.grid import Cell
from fedtalos.app.sweep.tables import COLUMNS, cell_text, read_result
from fedtalos.errors import printable
from fedtalos.files import opened

SHOWN = ("val_percent", "test_percent", "megabytes")
WIDTHS = {name: max(len(COLUMNS[name]), 8) for name in SHOWN}
TIME = 8
FEWEST = 20
"""Letters of a run's name that are shown, however narrow the terminal is."""


class GrowingTable:
    """Prints a line for every run that ends; what a run says itself goes to a log that stays only where it fails.

    growing = GrowingTable(cells, console)
    for number, cell in enumerate(cells, start=1):
        with growing.running(number, cell, log) as quiet:
            run(cell.config, quiet)
        growing.add(number, cell)
    """

    def __init__(self, cells: Sequence[Cell], console: Console) -> None:
        self._console, self._count = console, len(cells)
        self._number = len(f"[{self._count}/{self._count}]")
        longest = max((len(printable(cell.name)) for cell in cells), default=0)
        others = self._number + 1 + sum(width + 2 for width in (*WIDTHS.values(), TIME))
        self._name = min(longest, max(FEWEST, console.width - others))
        headings = "".join(f"  {COLUMNS[name]:>{WIDTHS[name]}}" for name in SHOWN)
        if cells:
            say(console, f"{'':{self._number}} {'run':{self._name}}{headings}  {'time':>{TIME}}")

    @contextmanager
    def running(self, number: int, cell: Cell, log: Path) -> Iterator[Console]:
        """Show where a run is, and give it a console that writes to ``log``; a traceback goes there too."""
        title = f"{self._heading(number)} {cell.name}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with io.TextIOWrapper(opened(log, "wb"), "utf-8", "backslashreplace", line_buffering=True) as file:
            try:
                with line_of(self._console, title, cell.paths) if is_live(self._console) else nullcontext(), hidden():
                    yield Console(file=file, force_terminal=False, width=120)
            except Exception:
                file.write(traceback.format_exc())
                raise
        log.unlink()

    def add(self, number: int, cell: Cell) -> None:
        """Print the line of a run that is finished."""
        values = read_result(cell).values
        figures = "".join(f"  {cell_text(name, values[name]):>{WIDTHS[name]}}" for name in SHOWN)
        name = printable(cell.name)
        if len(name) > self._name:  # its end tells it from others
            name = f"...{name[3 - self._name :]}"
        line = f"{self._heading(number)} {name:{self._name}}{figures}  {duration(values['seconds']):>{TIME}}"
        say(self._console, line)

    def note(self, number: int, cell: Cell, text: str) -> None:
        """Print why a run has no line of figures."""
        say(self._console, f"{self._heading(number)} {cell.name}{text}")

    def _heading(self, number: int) -> str:
        return f"[{number}/{self._count}]".rjust(self._number)
