"""Progress bars on the terminal, for the library's hook (progress.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fedtalos.app.run.display import OneLine, is_live
from fedtalos.progress import Advance

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def hidden() -> Iterator[None]:
    """Show no bars inside: something else has the terminal's last line.

    >>> with hidden():
    ...     load(config)
    """
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def bar(title: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show a bar on stderr as long as the context lasts, and nothing where stderr is no terminal.

    >>> with bar("decoding images", 2, "images") as advance:
    ...     advance(1)
    """
    console = Console(stderr=True)
    if _hidden.get() or not is_live(console):
        yield lambda _count: None
        return
    counts: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [TaskProgressColumn()]
    )
    columns = [TextColumn("{task.description}", markup=False), BarColumn(16), *counts, TimeRemainingColumn()]
    with OneLine(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
