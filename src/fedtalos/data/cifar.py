"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) as published: pickles, read without running what they ask for."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedtalos.data.class_names import class_name
from fedtalos.data.downloads import LARGEST, read_members
from fedtalos.data.images import LabelledImages, Published
from fedtalos.errors import InputError, shortened, shown
from fedtalos.facts import MOST_CHARACTERS, read_file
from fedtalos.progress import Bar, silent

Download = Callable[[str, Path, Bar], Path]
"""Takes an archive's name, the folder to put it in and a progress bar; gives the path where it is now."""


@dataclass(frozen=True)
class Cifar:
    """File names of a CIFAR set, and the keys inside its files.

    >>> CIFAR["cifar100"].label_key
    'fine_labels'
    """

    archive: str
    folder: str
    classes: int
    """Number of classes; a file may name fewer."""
    label_key: str
    names_key: str
    meta: str
    train: tuple[str, ...]
    test: str


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR = {
    "cifar100": Cifar(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        100,
        "fine_labels",
        "fine_label_names",
        "meta",
        ("train",),
        "test",
    ),
    "cifar10": Cifar(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        10,
        "labels",
        "label_names",
        "batches.meta",
        BATCHES,
        "test_batch",
    ),
}


def read_cifar(cifar: Cifar, data_dir: Path, download: Download, bar: Bar = silent) -> Published:
    """Read class names, training images and test images from the original files.

    They are looked for under ``data_dir``, then in the original archive there, which is downloaded where it is missing.

    Raises InputError where a file is damaged, not what it should be, or asks to run code.

    >>> len(read_cifar(CIFAR["cifar100"], Path("data"), fetch_archive).classes)
    100
    """
    files = _cifar_files(cifar, data_dir, download, bar)
    meta_file, meta = files[cifar.meta]
    names = _unpickled(meta, meta_file).get(cifar.names_key)
    if not (isinstance(names, list) and names and all(isinstance(n, str | bytes) for n in names)):
        raise _damaged(meta_file, f"holds no list {cifar.names_key!r} of class names")
    if len(names) > cifar.classes or max(map(len, names)) > MOST_CHARACTERS:
        raise _damaged(meta_file, f"holds other {cifar.names_key!r} than those of {cifar.classes} classes")
    train = [_cifar_images(cifar, *files[name], len(names)) for name in cifar.train]
    joined = LabelledImages(torch.cat([s.pixels for s in train]), torch.cat([s.labels for s in train]))
    return Published(
        tuple(class_name(_text(name)) for name in names), joined, _cifar_images(cifar, *files[cifar.test], len(names))
    )


def _cifar_files(cifar: Cifar, data_dir: Path, download: Download, bar: Bar) -> dict[str, tuple[str, bytes]]:
    """Find the files: name -> (its place, for messages; its content)."""
    wanted = (cifar.meta, *cifar.train, cifar.test)
    for folder in (data_dir / cifar.folder, data_dir):
        if all((folder / name).is_file() for name in wanted):
            paths = {name: folder / name for name in wanted}
            return {name: (str(path), read_file(path, str(path), most=LARGEST)) for name, path in paths.items()}
    archive = data_dir / cifar.archive
    if not archive.is_file():
        archive = download(cifar.archive, data_dir, bar)
    members = read_members(archive, {f"{cifar.folder}/{name}" for name in wanted})
    return {name: (f"{archive}: {name}", members[f"{cifar.folder}/{name}"]) for name in wanted}


def _cifar_images(cifar: Cifar, file: str, content: bytes, num_classes: int) -> LabelledImages:
    batch = _unpickled(content, file)
    data, labels = getattr(batch.get("data"), "bytes", None), batch.get(cifar.label_key)
    if not (data is not None and data.ndim == 2 and data.shape[1] == 3072):
        raise _damaged(file, "holds no uint8 images of 3 x 32 x 32")
    if not (isinstance(labels, list) and len(labels) == len(data) > 0):
        raise _damaged(file, f"does not hold one of {cifar.label_key!r} per image")
    if not all(type(label) is int and 0 <= label < num_classes for label in labels):
        raise _damaged(file, f"holds {cifar.label_key!r} outside 0..{num_classes - 1}")
    # A copy: the file's own bytes may not be written to.
    return LabelledImages(torch.from_numpy(data.copy()).reshape(-1, 3, 32, 32), torch.tensor(labels))


def _damaged(file: str, how: str) -> InputError:
    return InputError(f"{file} {how}: replace it by the original")


def _unpickled(content: bytes, file: str) -> dict[str, Any]:
    try:
        loaded = RestrictedUnpickler(content, file).load()
    except InputError:
        raise
    except Exception as error:  # broken pickles may raise anything
        raise _damaged(file, f"cannot be read ({shown(error)})") from error
    if not isinstance(loaded, dict):
        raise _damaged(file, "holds no dictionary")
    return {_text(key): value for key, value in loaded.items() if isinstance(key, str | bytes)}


def _text(name: str | bytes) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else name


class _Kind:
    """Stand-in for numpy.dtype: a name, whatever else a file says of it."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = _text(name) if isinstance(name, str | bytes) else None

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stand-in for numpy.ndarray, which would allocate whatever a file asks for."""

    bytes: NDArray[np.uint8] | None = None
    """The array that the file holds; None where its elements are no unsigned bytes."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[object, Any, _Kind, bool, Any]) -> None:
        _, shape, kind, by_columns, content = state
        if kind.name == "u1":
            self.bytes = np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")  # a view


ADMITTED = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Kind,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
}
MOST_STEPS = 2**21
"""Steps of a pickle; CIFAR-100's training file has 450 000. A step makes an object of 70 bytes or so."""
_FRAME, _BYTEARRAY = 0x95, 0x96
"""Steps of later protocols: a buffer of the steps that follow, and room for as many bytes as it likes."""


class _Steps(io.BytesIO):
    """A pickle that is read step by step, as far as MOST_STEPS."""

    steps = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise pickle.UnpicklingError("more objects than a data file has")
        return super().read(size)


class RestrictedUnpickler(pickle._Unpickler):
    """Unpickler of byte arrays, lists, dicts, strings, bytes and numbers; anything else is an InputError.

    An ordinary unpickler runs whatever code a file asks for. The one in C also lets five bytes ask for 64 GB, so this
    is built on the one in Python. What it makes is bounded: arrays are views of the file, text that is turned into
    bytes is as long as the file in all, and there are MOST_STEPS objects at most.

    >>> content = RestrictedUnpickler(Path("data/cifar-100-python/train").read_bytes(), "train").load()
    """

    def __init__(self, content: bytes, file: str) -> None:
        super().__init__(_Steps(content), encoding="bytes")
        self.file, self.room = file, len(content)

    def _encode(self, text: str, encoding: str) -> bytes:
        """Stand in for _codecs.encode, which pickles of protocol 2 call with latin1 alone."""
        self.room -= len(text)
        if encoding != "latin1" or self.room < 0:
            raise pickle.UnpicklingError(f"codec {shown(encoding)}, or more text than the file holds")
        return text.encode("latin1")

    def _skip_frame(self) -> None:
        self.read(8)  # type: ignore[attr-defined]

    def _refuse_bytearray(self) -> None:
        raise pickle.UnpicklingError("a bytearray")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        _FRAME: _skip_frame,
        _BYTEARRAY: _refuse_bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        try:
            return ADMITTED[f"{module}.{name}"]
        except KeyError:
            asked = shortened(f"{module}.{name}", 80)
            raise InputError(
                f"{self.file} asks for {asked}, which a data file has no need of: it may be hostile, "
                "replace it by the original"
            ) from None
