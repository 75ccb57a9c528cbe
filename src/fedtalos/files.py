"""Files: written whole or not at all, and sealed, so that a reader notices a change.

A file is written beside its place, flushed, synced and renamed.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

from fedtalos.errors import InputError
from fedtalos.progress import Bar

if sys.platform != "win32":
    import fcntl

UNSEALED = f"sha256:{0:064}"
"""Placeholder for the checksum; a file that is to be sealed holds it once."""
PART = re.compile(r"\.(.+)\.[0-9]+\.part", re.DOTALL)
"""Names of files that are being written: of which file, and by which process."""


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

    Text from names of files may hold what is no character; it is spelled out. What a killed process left of the same
    file is removed.

    >>> write_atomic(Path("results/notes.txt"), "all done")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name.__eq__)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path, instead_of=part), _locked_folder(path.parent, alone=False) as folder:
            with opened(part, "wb") as file:
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            if folder is not None:
                os.fsync(folder)  # makes the renaming last through a power cut
    finally:
        part.unlink(missing_ok=True)


def opened(path: Path, mode: Literal["ab", "wb"]) -> BinaryIO:
    """Open a file to write to as it grows; a link that lies there is removed, for who made it chose where to.

    >>> with opened(Path("results/mine/metrics.csv"), "ab") as file:
    ...     file.write(b"a row")
    """
    if path.is_symlink():
        path.unlink()
    return path.open(mode)


def refuse_link(folder: Path) -> None:
    """Refuse, with an InputError, to write into a run's folder that is a link: who made it chose where to.

    Folders above it, such as results/, may be links: on which disk they lie is for the owner of the place to say.

    >>> refuse_link(Path("plots/mine"))
    """
    if folder.is_symlink():
        raise InputError(f"{folder}: is a link, through which nothing is written; move it away, or give another name")


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


def remove_leftovers(folder: Path, of: Callable[[str], bool] = bool) -> None:
    """Delete what killed processes left half-written in ``folder``, of the files whose names ``of`` takes.

    Nothing is deleted while somebody writes there.

    >>> remove_leftovers(Path("masks"), {"mine.safetensors"}.__contains__)
    """
    with suppress(BlockingIOError, FileNotFoundError), _locked_folder(folder, alone=True):
        for path in folder.iterdir():
            part = PART.fullmatch(path.name)
            if part is not None and of(part[1]) and not path.is_dir():
                path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of blocks for the same ``path``, a file that may stay.

    The lock is the operating system's, so it ends with the process that holds it. Raises filelock's Timeout where
    another has it and nobody is to ``wait``, another OSError, which names the file, where the file system has no locks.

    >>> with locked(Path("results/mine/.lock")):
    ...     pass
    """
    from filelock import FileLock  # here, for the benchmark on a GPU does without

    lock = FileLock(path, fallback_to_soft=False)  # a lock that is only a file would outlive a killed process
    with naming(path):
        lock.acquire(timeout=-1 if wait else 0.1)  # is_locked holds it for an instant
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Tell whether a process is within ``locked(path)``, without writing there; it is looked at for an instant.

    >>> is_locked(Path("results/mine/.lock"))
    False
    """
    try:
        if sys.platform == "win32":
            with locked(path):
                return False
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for somebody who writes to it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except (BlockingIOError, TimeoutError):  # filelock's is one
        return True
    except OSError:  # no such file, or no such locks
        pass
    return False


@contextmanager
def in_turn(lock: Path, bar: Bar, waiting: str) -> Iterator[bool]:
    """Keep other processes out of blocks of the same ``lock``, a file that is gone afterwards; gives True inside.

    While another is in one, a bar says ``waiting``. False: files cannot be locked here, and nobody is kept out.

    >>> with in_turn(Path("data/.cifar-100-python.tar.gz.lock"), silent, "waiting for a run that downloads it"):
    ...     download()
    """
    from filelock import Timeout

    with ExitStack() as held:
        alone = False
        with suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(locked(lock))
            except Timeout:
                with bar(waiting, None, "images"):
                    held.enter_context(locked(lock, wait=True))
            held.callback(_remove, lock)  # under the lock: whoever waits for it sees that it is gone, and tries anew
            alone = True
        yield alone


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@contextmanager
def _locked_folder(folder: Path, *, alone: bool) -> Iterator[int | None]:
    """Open a folder: beside others who write there, or ``alone``, or with a BlockingIOError.

    File systems without such locks, and Windows (None), give it to everybody.
    """
    if sys.platform == "win32":
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield descriptor
    finally:
        os.close(descriptor)
