"""Data sets as tensors: training, calibration, validation and test images with labels, whole, in memory.

Letters: N images, H W pixels, C classes.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedtalos.data.cifar import CIFAR, Download, read_cifar
from fedtalos.data.downloads import fetch_archive
from fedtalos.data.image_folder import read_image_folder
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import stratified_sample
from fedtalos.errors import InputError
from fedtalos.randomness import generator

DatasetName = Literal["cifar100", "cifar10", "digits", "folder"]

TEST_SHARE = 0.2  # of the images of a data set that comes without a test set


@dataclass(frozen=True, eq=False)
class Dataset:
    """Four disjoint splits; ``fingerprint`` is the same where pixels, labels, classes and splits are.

    ``calibration`` is what masks are calibrated on: held out like ``val``, so that no client's image is used
    and validation images are not learned from.
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
    classes: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages | None  # None: none is published
    match name:
        case "cifar100" | "cifar10":
            classes, train, test = read_cifar(CIFAR[name], data_dir, download)
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
