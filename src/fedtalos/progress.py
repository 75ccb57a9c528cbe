"""A hook for progress bars: the library says how far it is, and a program may show it.

The program's own bars are in app/run/bars.py; a notebook can pass any function of the type Bar.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
"""Takes how many images or bytes were done since its last call."""

Bar = Callable[[str, int | None, str], AbstractContextManager[Advance]]
"""Takes a title, a total (None: not known) and a unit, "images" or "bytes"; the bar lasts as long as the context."""


@contextmanager
def silent(_title: str, _total: int | None, _unit: str) -> Iterator[Advance]:
    """Show nothing; the default of every function that takes a bar.

    >>> with silent("decoding images", 2, "images") as advance:
    ...     advance(1)
    """
    yield lambda _count: None
