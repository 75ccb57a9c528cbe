"""Data sets as tensors: training, validation and test images with labels, whole, in memory.

Letters: N images, H W pixels, C classes.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.data.downloads import fetch_archive, read_members
from fedtalos.data.image_folder import read_image_folder
from fedtalos.data.partition import stratified_sample
from fedtalos.errors import InputError
from fedtalos.randomness import generator

DatasetName = Literal["cifar100", "cifar10", "digits", "folder"]

TEST_SHARE = 0.2  # of the images of a data set that comes without a test set


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """uint8 pixels (N, 3, H, W) and int64 labels (N,), on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | NDArray[np.int64]) -> "LabelledImages":
        """The images at ``indices`` (n,), in that order."""
        at = torch.as_tensor(indices, device=self.labels.device)
        return LabelledImages(self.pixels[at], self.labels[at])

    def to(self, device: torch.device | str) -> "LabelledImages":
        return LabelledImages(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Four disjoint splits; ``fingerprint`` is the same where pixels, labels, classes and splits are.

    ``calibration`` is what masks are calibrated on: held out like ``val``, so that no client's image is used and
    validation stays blind.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledImages
    calibration: LabelledImages
    val: LabelledImages
    test: LabelledImages
    fingerprint: str

    def to(self, device: torch.device | str) -> "Dataset":
        splits = {name: getattr(self, name).to(device) for name in ("train", "calibration", "val", "test")}
        return replace(self, **splits)


Download = Callable[[str, Path], Path]  # archive name, folder to put it in -> where it is now
Published = tuple[tuple[str, ...], LabelledImages, LabelledImages | None]  # classes, training set, test set


def load_dataset(
    name: DatasetName,
    data_dir: Path,
    *,
    val_fraction: float,
    calibration_fraction: float,
    seed: int,
    image_size: int,
    download: Download = fetch_archive,
) -> Dataset:
    """Read a data set and take validation, then calibration images off its training set.

    cifar100 and cifar10 use the original files or archive under ``data_dir``, else ``download`` the
    archive. digits needs no files. folder decodes DIR/CLASS or DIR/train/CLASS and DIR/test/CLASS to
    squares of ``image_size`` pixels a side (unused elsewhere). Validation is stratified, drawn from ``seed``,
    round(val_fraction N) images; calibration likewise of the rest (it may come out empty); all splits keep the
    stored order. Where no test set is published, a stratified fifth is, whatever the seed. Raises InputError on
    missing, damaged or unfit data.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"--val_fraction {val_fraction}: expected a share between 0 and 1, such as 0.1")
    match name:
        case "cifar100" | "cifar10":
            classes, train, test = _read_cifar(CIFAR[name], data_dir, download)
        case "digits":
            classes, train, test = _read_digits()
        case "folder":
            classes, train, test = _read_folder(data_dir, image_size)
    if test is None:
        train, test = _stratified_split(train, TEST_SHARE, classes, "the test set", generator(0, "test", name))
    rng = generator(seed, "validation")
    count = len(train)
    train, val = _stratified_split(train, val_fraction, classes, f"--val_fraction {val_fraction}", rng)
    if len(val) == 0:
        raise InputError(f"--val_fraction {val_fraction}: its share of {count} images is none, take more or add images")
    rng = generator(seed, "calibration")
    purpose = f"--calibration_fraction {calibration_fraction}"
    train, calibration = _stratified_split(train, calibration_fraction, classes, purpose, rng)
    return Dataset(name, classes, train, calibration, val, test, _fingerprint(classes, train, calibration, val, test))


def _fingerprint(classes: tuple[str, ...], *splits: LabelledImages) -> str:
    digest = hashlib.blake2b(repr(classes).encode(), digest_size=16)
    for split in splits:
        digest.update(repr(tuple(split.pixels.shape)).encode())
        digest.update(split.pixels.contiguous().numpy().data)
        digest.update(split.labels.numpy().data)
    return digest.hexdigest()


def _stratified_split(
    images: LabelledImages, fraction: float, classes: tuple[str, ...], purpose: str, rng: np.random.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Remainder and part, in stored order; the part has round(fraction N) images, each class its share."""
    labels = images.labels.numpy()
    part = stratified_sample(labels, fraction, rng)
    rest = np.setdiff1d(np.arange(len(labels)), part, assume_unique=True)
    bare = [name for c, name in enumerate(classes) if c not in labels[rest]]
    if bare:
        raise InputError(f"{purpose} leaves class {bare[0]!r} without training images: take less, or add images of it")
    return images.subset(rest), images.subset(part)


def _read_digits() -> Published:
    from sklearn.datasets import load_digits  # a slow import that only this data set needs

    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))  # (N, 8, 8), from 0..16
    pixels = grey.unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return tuple(str(digit) for digit in digits.target_names), LabelledImages(pixels, labels), None


def _read_folder(data_dir: Path, image_size: int) -> Published:
    classes, tensors = read_image_folder(data_dir, image_size)
    train = LabelledImages(tensors["train_pixels"], tensors["train_labels"])
    has_test = "test_pixels" in tensors
    return classes, train, LabelledImages(tensors["test_pixels"], tensors["test_labels"]) if has_test else None


@dataclass(frozen=True)
class Cifar:
    """Where a CIFAR set lies, and what its files call things."""

    archive: str
    folder: str
    label_key: str
    names_key: str
    meta: str
    train: tuple[str, ...]
    test: str


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR = {
    "cifar100": Cifar(
        "cifar-100-python.tar.gz", "cifar-100-python", "fine_labels", "fine_label_names", "meta", ("train",), "test"
    ),
    "cifar10": Cifar(
        "cifar-10-python.tar.gz", "cifar-10-batches-py", "labels", "label_names", "batches.meta", BATCHES, "test_batch"
    ),
}


def _read_cifar(cifar: Cifar, data_dir: Path, download: Download) -> Published:
    files = _cifar_files(cifar, data_dir, download)
    meta_file, meta = files[cifar.meta]
    names = _unpickled(meta, meta_file).get(cifar.names_key)
    if not (isinstance(names, list) and names and all(isinstance(n, str | bytes) for n in names)):
        raise _damaged(meta_file, f"holds no list {cifar.names_key!r} of class names")
    train = [_cifar_images(cifar, *files[name], len(names)) for name in cifar.train]
    joined = LabelledImages(torch.cat([s.pixels for s in train]), torch.cat([s.labels for s in train]))
    return tuple(map(_text, names)), joined, _cifar_images(cifar, *files[cifar.test], len(names))


def _cifar_files(cifar: Cifar, data_dir: Path, download: Download) -> dict[str, tuple[str, bytes]]:
    """File name -> (where it lies, for messages; its content)."""
    wanted = (cifar.meta, *cifar.train, cifar.test)
    for folder in (data_dir / cifar.folder, data_dir):
        if all((folder / name).is_file() for name in wanted):
            return {name: (str(folder / name), (folder / name).read_bytes()) for name in wanted}
    archive = data_dir / cifar.archive
    if not archive.is_file():
        archive = download(cifar.archive, data_dir)
    members = read_members(archive, {f"{cifar.folder}/{name}" for name in wanted})
    return {name: (f"{archive}: {name}", members[f"{cifar.folder}/{name}"]) for name in wanted}


def _cifar_images(cifar: Cifar, file: str, content: bytes, num_classes: int) -> LabelledImages:
    batch = _unpickled(content, file)
    data, labels = batch.get("data"), batch.get(cifar.label_key)
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        raise _damaged(file, "holds no uint8 images of 3 x 32 x 32")
    if not (isinstance(labels, list) and len(labels) == len(data) > 0):
        raise _damaged(file, f"does not hold one of {cifar.label_key!r} per image")
    if not all(type(label) is int and 0 <= label < num_classes for label in labels):
        raise _damaged(file, f"holds {cifar.label_key!r} outside 0..{num_classes - 1}")
    return LabelledImages(torch.from_numpy(data).reshape(-1, 3, 32, 32), torch.tensor(labels))


def _damaged(file: str, how: str) -> InputError:
    return InputError(f"{file} {how}: replace it by the original")


def _unpickled(content: bytes, file: str) -> dict[str, Any]:
    try:
        loaded = RestrictedUnpickler(content, file).load()
    except InputError:
        raise
    except Exception as error:  # broken pickles may raise anything
        raise _damaged(file, f"cannot be read ({error})") from error
    if not isinstance(loaded, dict):
        raise _damaged(file, "holds no dictionary")
    return {_text(key): value for key, value in loaded.items()}


def _text(name: str | bytes) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What pickles of protocol 2 call ``_codecs.encode`` for, and nothing else of it."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


# numpy keeps its _reconstruct in a private module, under a name that has changed; an array knows it.
_RECONSTRUCT = np.empty(0).__reduce__()[0]

ADMITTED = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "_codecs.encode": _encode_latin1,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays, lists, dicts, strings, bytes and numbers; anything else is an InputError.

    An ordinary unpickler runs whatever code a file asks for.
    """

    def __init__(self, content: bytes, file: str) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ADMITTED[f"{module}.{name}"]
        except KeyError:
            raise InputError(
                f"{self.file} asks for {module}.{name}, which a data file has no need of: it may be hostile, "
                "replace it by the original"
            ) from None
