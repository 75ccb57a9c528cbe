"""The cache of decoded images: files under the user's cache folder, shared by runs, bounded in size.

An entry is a safetensors file, named for its image folder and for a digest of what the folder holds. Where the cache
cannot be read or written, runs decode anew.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import platformdirs
from annotated_types import MaxLen, Predicate
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedtalos.data.folder_layout import SPLITS
from fedtalos.errors import InputError
from fedtalos.facts import ClassNames, read_facts, schema
from fedtalos.files import in_turn, remove_leftovers
from fedtalos.progress import Bar, silent
from fedtalos.tensor_file import check_header, metadata_of, read_header

LIMIT = 20_000_000_000
"""Bytes of all entries together; what was not used for longest goes first."""
DAY = 24 * 60 * 60  # seconds after which a part or a lock is one that a killed process left


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Choose the folder of entries: below ``cache_dir``, else $FEDTALOS_CACHE, else the user's cache folder.

    >>> cache_folder(Path("/scratch/cache"))
    PosixPath('/scratch/cache/images')
    """
    if given := cache_dir or os.environ.get("FEDTALOS_CACHE"):
        return Path(given) / "images"
    usual = Path(platformdirs.user_cache_dir("fedtalos", appauthor=False))
    # A user without a home has no such folder; nothing can be written below this one.
    return (usual if usual.is_absolute() else Path(os.devnull)) / "images"


Sentence = Annotated[str, MaxLen(2**14)]


@schema
@dataclass(frozen=True)
class Facts:
    """Facts of decoded images: their classes, their splits, and sentences about what was decided, by what about."""

    classes: ClassNames
    splits: Annotated[tuple[Annotated[str, Predicate(SPLITS.__contains__)], ...], MaxLen(3)]
    said: Annotated[dict[Sentence, Sentence], MaxLen(100)]


@dataclass(frozen=True)
class Entry:
    """Place of one folder's decoded images; ``source`` is the same for all that the folder ever held.

    >>> entry = Entry(cache_folder(), "photos_224px_1f0c", "9e3b")
    """

    folder: Path
    source: str
    digest: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.source}_{self.digest}.safetensors"

    def load(self) -> tuple[dict[str, Tensor], Facts] | None:
        """Read tensors and facts; None: they are not there, not whole, or not what they should be."""
        try:
            header = read_header(self.path, str(self.path))
            check_header(header, str(self.path))
            text = metadata_of(header, "facts", str(self.path)).encode()  # bytes: names of files may be no text
            facts = read_facts(Facts, text, str(self.path))
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        except (InputError, SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
            return None
        with suppress(OSError):
            os.utime(self.path)  # used now; where that cannot be said, it goes the sooner
        return tensors, facts

    def save(self, tensors: dict[str, Tensor], facts: Facts) -> str | None:
        """Write the entry, and remove what it replaces and what is beyond LIMIT; returns why that could not be."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > LIMIT:
            return f"their {size / 1e9:.1f} GB are more than its {LIMIT / 1e9:g}"
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            if shutil.disk_usage(self.folder).free < size + 2**20:
                return f"less than {size / 1e9:.1f} GB are free in {self.folder}"
            part.touch()
            mode = part.stat().st_mode  # others may read it, where they may read what this user writes
            save_file(tensors, part, {"facts": json.dumps(asdict(facts))})
            part.chmod(mode)
            part.replace(self.path)
        except (OSError, SafetensorError) as error:
            return f"{self.folder}: {getattr(error, 'strerror', None) or error}"
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return None

    def _make_room(self, size: int) -> None:
        """Remove this folder's older entries, leftovers, and the least recently used entries beyond the limit."""
        kept = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another run was faster, or has it open
                stat = path.stat()
                if path.suffix in (".part", ".lock"):
                    if stat.st_mtime < time.time() - DAY:
                        path.unlink()
                elif path.name.startswith(f"{self.source}_"):
                    path.unlink()
                elif path.suffix == self.path.suffix:
                    kept.append((stat.st_mtime, stat.st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if total <= LIMIT:
                break
            with suppress(OSError):
                path.unlink()
                total -= bytes_

    @contextmanager
    def alone(self, bar: Bar = silent) -> Iterator[None]:
        """Keep other runs from decoding the same images at the same time, where files can be locked.

        What a killed one left half-written of these images is removed.
        """
        of_these = re.compile(rf"{re.escape(self.source)}_[0-9a-f]+\.safetensors")
        with in_turn(self.folder / f".{self.source}.lock", bar, "waiting for a run that decodes these images") as alone:
            if alone:
                remove_leftovers(self.folder, lambda name: of_these.fullmatch(name) is not None)
            yield


def source_name(folder: Path, image_size: int, digest: str) -> str:
    """Name the entries of an image folder, so that people find them.

    >>> source_name(Path("/data/my photos"), 224, "1f0c")
    'my_photos_224px_1f0c'
    """
    return f"{re.sub(r'[^A-Za-z0-9-]+', '_', folder.name)[:40]}_{image_size}px_{digest}"
