"""Image folders: one folder per class, decoded once to a cached tensor file.

Either DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or DIR/CLASS/*.jpg with no test set of its own.
Letters: N images, S pixels a side.
"""

import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor

from fedtalos.data.images import LabelledImages, Published
from fedtalos.errors import InputError
from fedtalos.files import write_atomic
from fedtalos.progress import Bar, silent
from fedtalos.randomness import generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")  # whatever the suffix says: for some others Pillow starts programs
CACHE = ".fedtalos_cache"

Pixels = NDArray[np.uint8]
Listing = dict[str, list[Path]]  # class name -> its image files, both in sorted order


def read_image_folder(folder: Path, image_size: int, bar: Bar = silent) -> Published:
    """Read class names, training images and test images (None: no test folder) of uint8 (N, 3, S, S).

    The shorter side is scaled to S = ``image_size`` and the middle square is kept. Images lie in one fixed shuffled
    order, so that the first n are of mixed classes. The first call decodes the images and writes the cache. Later calls
    read it, until a file is added, removed or changed.

    Raises InputError, which names the file or folder at fault; nothing is written then.

    >>> classes, train, test = read_image_folder(Path("photos"), image_size=224)
    """
    if image_size < 1:
        raise InputError(f"image_size {image_size}: expected at least 1 pixel")
    listings = _listings(folder)
    cache = folder / CACHE / f"{image_size}px_{_fingerprint(folder, listings, image_size)}.safetensors"
    if not cache.exists():
        tensors: dict[str, Tensor] = {}
        for split, listing in listings.items():
            tensors[f"{split}_pixels"], tensors[f"{split}_labels"] = _decode(split, listing, image_size, bar)
        try:
            write_atomic(cache, safetensors.torch.save(tensors))
        except OSError as error:
            raise InputError(
                f"the decoded images could not be written to {cache} ({error.strerror}): give data_dir a folder "
                "with space that you may write to"
            ) from error
    images: dict[str, LabelledImages] = {}
    try:
        tensors = safetensors.torch.load_file(cache)
        for split, listing in listings.items():
            pixels, labels = tensors[f"{split}_pixels"], tensors[f"{split}_labels"]
            shape = (sum(map(len, listing.values())), 3, image_size, image_size)
            if pixels.dtype != torch.uint8 or pixels.shape != shape or not torch.equal(labels, _labels(split, listing)):
                raise ValueError("it is of other images")
            images[split] = LabelledImages(pixels, labels)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{cache} cannot be read ({error}): delete it, it will be made again") from error
    return tuple(listings["train"]), images["train"], images.get("test")


def _listings(folder: Path) -> dict[str, Listing]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give data_dir a folder of class folders of images")
    if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        return {"train": _class_folders(folder)}
    train, test = _class_folders(folder / "train"), _class_folders(folder / "test")
    if train.keys() != test.keys():
        odd = min(train.keys() ^ test.keys())
        there, missing = ("train", "test") if odd in train else ("test", "train")
        raise InputError(
            f"{folder / there / odd} has no counterpart {folder / missing / odd}: train and test need the same "
            "class folders"
        )
    return {"train": train, "test": test}


def _class_folders(folder: Path) -> Listing:
    listing: Listing = {}
    for class_folder in sorted(folder.iterdir()):
        if class_folder.is_dir() and not class_folder.name.startswith("."):
            listing[class_folder.name] = sorted(
                file
                for file in class_folder.iterdir()
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
            )
    kinds = ", ".join(SUFFIXES)
    if not listing:
        raise InputError(f"{folder} holds no class folders: expected {folder}/CLASS/IMAGE with images of {kinds}")
    for name, files in listing.items():
        if not files:
            raise InputError(
                f"{folder / name} holds no images ({kinds}): every class folder needs some; remove it or fill it"
            )
        for file in files:
            if not file.is_file():  # a folder, a pipe, a link to nothing or to itself
                raise InputError(f"{file} is called an image and is no file: replace or remove it")
    return listing


def _fingerprint(folder: Path, listings: dict[str, Listing], image_size: int) -> str:
    digest = hashlib.blake2b(repr(image_size).encode(), digest_size=8)
    for listing in listings.values():
        for files in listing.values():
            for file in files:
                stat = file.stat()
                seen = (file.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns)
                digest.update(repr(seen).encode())
    return digest.hexdigest()


def _decode(split: str, listing: Listing, image_size: int, bar: Bar) -> tuple[Tensor, Tensor]:
    """Decode to pixels (N, 3, S, S) and labels (N,), in the fixed shuffled order."""
    files = [file for files in listing.values() for file in files]
    order = _order(split, len(files))
    pixels = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor() as threads,
        bar(f"decoding {split} images", len(files), "images") as advance,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        images = threads.map(partial(_read_image, image_size=image_size), [files[i] for i in order])
        for i, image in enumerate(images):
            pixels[i] = torch.from_numpy(image).permute(2, 0, 1)
            advance(1)
    return pixels, _labels(split, listing)


def _order(split: str, count: int) -> NDArray[np.int64]:
    return generator(0, "folder order", split).permutation(count)


def _labels(split: str, listing: Listing) -> Tensor:
    labels = np.repeat(np.arange(len(listing)), [len(files) for files in listing.values()])
    return torch.from_numpy(labels[_order(split, len(labels))])


def _read_image(file: Path, image_size: int) -> Pixels:
    """Decode the middle square, upright, in RGB: uint8 (S, S, 3)."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photo and its preview
                raise ValueError("it is animated")
            rgb = _as_rgb(ImageOps.exif_transpose(image))
            return np.array(ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.LANCZOS))
    except Exception as error:  # a decoder fed with broken bytes may raise anything
        raise InputError(f"{file} is not a readable image ({error}): replace or remove it") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255 rather than scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # Pillow warns where a palette with transparency does not go through RGBA
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
