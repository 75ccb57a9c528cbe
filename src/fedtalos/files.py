"""Files appear whole or not at all: written beside, flushed, synced, renamed."""

import os
from pathlib import Path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, so that a reader or a crash sees the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path, stem: str = "") -> None:
    """Delete what a killed process left half-written in ``folder``, of files whose names begin with ``stem``."""
    for part in folder.glob(f".{stem}*.part"):
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a power cut, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
