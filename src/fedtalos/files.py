"""Files: written whole or not at all, and sealed, so that a reader notices a change.

A file is written beside its place, flushed, synced and renamed.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNSEALED = f"sha256:{0:064}"
"""Placeholder for the checksum; a file that is to be sealed holds it once."""


def sealed(content: bytes) -> bytes:
    """Put the content's own SHA-256 checksum in place of UNSEALED.

    >>> is_sealed(sealed(f"{UNSEALED} and more".encode()))
    True
    """
    return content.replace(UNSEALED.encode(), f"sha256:{hashlib.sha256(content).hexdigest()}".encode(), 1)


def is_sealed(content: bytes) -> bool:
    """Tell whether the content is what ``sealed`` gave, to the bit; ask before trusting anything else in it.

    >>> is_sealed(b"anything else")
    False
    """
    found = re.search(rb"sha256:[0-9a-f]{64}", content)
    return found is not None and sealed(content.replace(found[0], UNSEALED.encode(), 1)) == content


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, so that a reader or a crash sees the old file or the new.

    Text from names of files may hold what is no character; it is spelled out.

    >>> write_atomic(Path("results/notes.txt"), "all done")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path, instead_of=part):
            with part.open("wb") as file:
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Put ``path`` into an OSError that leaves the block and names no file, or only ``instead_of``.

    Opening a file names it; writing to it, on a disk that is full, does not.

    >>> with naming(Path("results/table.csv")), Path("results/table.csv").open("a") as file:
    ...     file.write("a row")
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or (instead_of is not None and str(error.filename) == str(instead_of)):
            if error.strerror is None:
                error.strerror = str(error)
            error.filename, error.filename2 = str(path), None
        raise


def remove_leftovers(folder: Path, stem: str = "") -> None:
    """Delete the half-written files that a killed process left in ``folder``, of names that begin with ``stem``.

    >>> remove_leftovers(Path("results"), "notes")
    """
    for part in folder.glob(f".{stem}*.part"):
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a power cut, on systems that can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
