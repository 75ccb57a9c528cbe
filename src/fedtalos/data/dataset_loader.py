"""Data sets: training, calibration, validation and test images with labels, whole, in memory.

Letters: N images.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from fedtalos.data.cifar import CIFAR, Download, read_cifar
from fedtalos.data.downloads import fetch_archive
from fedtalos.data.hub_dataset import HUB, read_hub_dataset
from fedtalos.data.image_folder import read_image_folder
from fedtalos.data.image_table import read_image_table
from fedtalos.data.images import LabelledImages, Published
from fedtalos.data.sampling import stratified_sample
from fedtalos.errors import InputError, shown
from fedtalos.notes import note
from fedtalos.progress import Bar, silent
from fedtalos.randomness import generator

DatasetName = Literal["cifar100", "cifar10", "digits", "folder", "csv"]
"""Data sets by name; besides, hf:OWNER/NAME is one of the Hugging Face hub."""

TEST_SHARE = 0.2
"""Share of the images that a data set without a test set gives up for one."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Four disjoint splits of labelled images, and the names of their classes.

    >>> data = load_dataset("digits")
    >>> len(data.train), len(data.calibration), len(data.val), len(data.test)
    (1268, 26, 144, 359)
    """

    name: str
    classes: tuple[str, ...]
    """Class names; a label is a place in them."""
    train: LabelledImages
    """Images to train on; a federated run splits these over its clients."""
    calibration: LabelledImages
    """Images for heads and masks: no client owns them, and validation stays unseen."""
    val: LabelledImages
    """Images to choose by: rates, penalties, the best round."""
    test: LabelledImages
    """Images for the final figure alone."""
    fingerprint: str
    """Digest of pixels, labels, classes and splits; it ignores the name."""

    def to(self, device: torch.device | str) -> "Dataset":
        """Put all splits on a device."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "calibration", "val", "test")}
        return replace(self, **splits)


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    *,
    val_fraction: float = 0.1,
    calibration_fraction: float = 0.02,
    seed: int = 0,
    image_size: int = 224,
    cache_dir: str | Path | None = None,
    download: Download = fetch_archive,
    bar: Bar = silent,
) -> Dataset:
    """Read a data set, and take validation, then calibration images off its training set.

    - cifar100, cifar10: the original files or archive under ``data_dir``; where neither is there, the archive is
      downloaded (about 160 MB).
    - digits: scikit-learn's, 8 x 8 pixels; needs no files.
    - folder: ``data_dir``/CLASS, or ``data_dir``/train/CLASS beside test and val folders, decoded to squares of
      ``image_size`` pixels a side, which are kept under ``cache_dir`` (docs/images.md).
    - csv: the images that the table ``data_dir`` names, decoded likewise: columns path, label, and client and split
      where they are there.
    - hf:OWNER/NAME: of the Hugging Face hub, or hf:FOLDER that the library datasets saved; needs it.

    Validation is a stratified sample of round(val_fraction N) training images, drawn from ``seed``, unless the data set
    has its own. Calibration is a sample of the rest, and may be empty. Where no test set is published, a stratified
    fifth of the training images becomes one, whatever the seed. All splits keep the stored order.

    Raises InputError for an unknown name or share, and for missing, damaged or unfit data.

    >>> data = load_dataset("cifar100")
    >>> photos = load_dataset("folder", "photos", image_size=224)
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction {val_fraction}: expected a share between 0 and 1, such as 0.1")
    if not 0 <= calibration_fraction < 1:
        raise InputError(
            f"calibration_fraction {calibration_fraction}: expected a share of at least 0 and below 1, such as 0.02"
        )
    published = _read(name, Path(data_dir), image_size, None if cache_dir is None else Path(cache_dir), download, bar)
    classes, train, test, val = published.classes, published.train, published.test, published.val
    if test is None:
        train, test = _stratified_split(train, TEST_SHARE, classes, "the test set", generator(0, "test", name))
    if val is None:
        rng = generator(seed, "validation")
        count = len(train)
        train, val = _stratified_split(train, val_fraction, classes, f"val_fraction {val_fraction}", rng)
        if len(val) == 0:
            raise InputError(
                f"val_fraction {val_fraction}: its share of {count} images is none, take more or add images"
            )
    if name in ("folder", "csv") or name.startswith(HUB):
        _note_splits(published, name, len(val), len(test), val_fraction)
    rng = generator(seed, "calibration")
    purpose = f"calibration_fraction {calibration_fraction}"
    train, calibration = _stratified_split(train, calibration_fraction, classes, purpose, rng)
    return Dataset(name, classes, train, calibration, val, test, _fingerprint(classes, train, calibration, val, test))


def _note_splits(published: Published, name: str, val: int, test: int, val_fraction: float) -> None:
    """Say which images of somebody's own became the validation and the test set."""
    if published.test is None:
        taken = "a folder called test" if name == "folder" else "a split called test"
        note("test images", f"{test}, drawn from the training images: {taken} would be taken as it is")
    if published.val is None:
        note("validation images", f"{val}, drawn from the training images (val_fraction {val_fraction:g})")
    else:
        whose = "folder" if name == "folder" else "data"
        note("validation images", f"the {whose}'s own {val}; val_fraction is not used")


def _read(
    name: str, data_dir: Path, image_size: int, cache_dir: Path | None, download: Download, bar: Bar
) -> Published:
    match name:
        case "cifar100" | "cifar10":
            return read_cifar(CIFAR[name], data_dir, download, bar)
        case "digits":
            return _read_digits()
        case "folder":
            return read_image_folder(data_dir, image_size, bar, cache_dir=cache_dir)
        case "csv":
            return read_image_table(data_dir, image_size, bar, cache_dir=cache_dir)
        case _ if name.startswith(HUB):
            return read_hub_dataset(name, image_size, bar, cache_dir=cache_dir)
        case _:
            known = ", ".join(get_args(DatasetName))
            raise InputError(f"name {shown(name)}: expected one of {known}, or {HUB}OWNER/NAME")


def _fingerprint(classes: tuple[str, ...], *splits: LabelledImages) -> str:
    digest = hashlib.blake2b(repr(classes).encode(), digest_size=16)
    for split in splits:
        digest.update(repr(tuple(split.pixels.shape)).encode())
        digest.update(split.pixels.contiguous().numpy().data)
        digest.update(split.labels.numpy().data)
        if split.owners is not None:
            digest.update(split.owners.numpy().data)
    return digest.hexdigest()


def _stratified_split(
    images: LabelledImages, fraction: float, classes: tuple[str, ...], purpose: str, rng: np.random.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Split into remainder and part, in stored order; the part has round(fraction N) images, each class its share."""
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
    return Published(tuple(str(digit) for digit in digits.target_names), LabelledImages(pixels, labels))
