"""The bounds of a refusal of a hostile file: one short printable sentence, and memory that the file accounts for."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtalos.errors import InputError

MEGABYTE = 2**20
LONGEST = 300
"""Characters of a message of the reader of facts."""

STATUS = Path("/proc/self/status")
ROOM = 4 * 2**30
"""Address space that threads and libraries reserve without using it."""


def kilobytes(key: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))


@contextmanager
def memory(megabytes: int) -> Iterator[None]:
    """Fail where the block takes more memory than that at its peak; the system refuses it far more at once.

    The peak is Linux's (VmHWM, begun anew); elsewhere nothing is measured.
    """
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (kilobytes("VmSize") * 1024 + megabytes * MEGABYTE + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    taken = (kilobytes("VmHWM") - before) // 1024
    assert taken <= megabytes, f"{taken} MB, of which {megabytes} were allowed"


@contextmanager
def refused(*words: str, longest: int = LONGEST) -> Iterator[None]:
    """Expect an InputError that is one printable line with these words."""
    with pytest.raises(InputError) as error:
        yield
    check_sentence(str(error.value), *words, longest=longest)


@contextmanager
def refused_if_at_all(longest: int = LONGEST) -> Iterator[list[str]]:
    """Expect nothing, or such a line, which is put into the list."""
    said: list[str] = []
    try:
        yield said
    except InputError as error:
        said.append(str(error))
        check_sentence(said[0], longest=longest)


def check_sentence(said: str, *words: str, longest: int = LONGEST) -> None:
    assert said.isprintable(), said
    assert 0 < len(said) < longest, (len(said), said)
    assert [word for word in words if word not in said] == [], said
