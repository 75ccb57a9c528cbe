"""Ctrl-C and SIGTERM: raised at once, or, while there is something to save, at the next safe point."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Interrupted(BaseException):
    """The process was asked to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


class _Signals:
    """Signals that this process got: they belong to all of it."""

    deferred = False
    asked: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self.deferred:
            raise Interrupted(number)
        if self.asked is not None:
            raise KeyboardInterrupt  # asked for twice: at once, and nothing is saved
        self.asked = number


_signals = _Signals()


@contextmanager
def handled() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Interrupted inside; in the main thread alone, for other threads get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Raise Interrupted at safe points only inside, and at the end."""
    _signals.deferred, _signals.asked = True, None
    try:
        yield
        safe_point()
    finally:
        _signals.deferred, _signals.asked = False, None


def asked() -> bool:
    """Tell whether the process was asked to stop, and has not yet."""
    return _signals.asked is not None


def safe_point() -> None:
    """Raise Interrupted where the process was asked to stop."""
    if _signals.asked is not None:
        raise Interrupted(_signals.asked)


def with_safe_points(items: Iterable[T]) -> Iterator[T]:
    """Pass ``items`` on, with a safe point before each."""
    for item in items:
        safe_point()
        yield item


def until_asked(items: Iterable[T]) -> Iterator[T]:
    """Pass ``items`` on, and end early, without a word, where the process was asked to stop."""
    for item in items:
        if asked():
            return
        yield item
