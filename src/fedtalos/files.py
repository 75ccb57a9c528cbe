"""Files appear whole or not at all: written beside, flushed, synced, renamed; sealed ones say whether they changed."""

import hashlib
import os
import re
from pathlib import Path

UNSEALED = f"sha256:{0:064}"
"""What a file that is to be sealed holds once, where its checksum is to be."""


def sealed(content: bytes) -> bytes:
    """``content`` with its own checksum, of SHA-256, in place of UNSEALED."""
    return content.replace(UNSEALED.encode(), f"sha256:{hashlib.sha256(content).hexdigest()}".encode(), 1)


def is_sealed(content: bytes) -> bool:
    """Whether this is what ``sealed`` gave, to the bit: asked before anything else is read of it."""
    found = re.search(rb"sha256:[0-9a-f]{64}", content)
    return found is not None and sealed(content.replace(found[0], UNSEALED.encode(), 1)) == content


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
