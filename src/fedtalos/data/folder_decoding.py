"""Decoding of a folder's images: which files are images, on which scale, and what was peculiar about them.

Letters: N images, S pixels a side.
"""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fedtalos.data.class_names import nor_others, some
from fedtalos.data.decoding import LARGE, Square, decode_image, inspect_image
from fedtalos.data.deep_images import Scale
from fedtalos.data.folder_layout import Files, Layout, check_two_classes
from fedtalos.data.image_files import OTHER_PICTURES, BadImageError, NotAnImageError
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError, nearest
from fedtalos.facts import MOST_CLASSES, check_free
from fedtalos.progress import Bar, silent
from fedtalos.randomness import generator

T = TypeVar("T")
IN_FLIGHT = 256  # files that threads have ahead of us; more would only fill the memory


@dataclass(frozen=True)
class DecodedFolder:
    """Class names, images by split, and sentences about what was decided, by what they are about."""

    classes: tuple[str, ...]
    splits: dict[str, LabelledImages]
    said: dict[str, str]


@dataclass
class _Found:
    """Images of a folder, by split and class, after a look into each file."""

    images: dict[str, Files] = field(default_factory=dict)
    left_out: dict[str, Files] = field(default_factory=dict)
    """Files that are no images, in the same way."""
    deep: list[tuple[float, float]] = field(default_factory=list)
    """Least and greatest value of each image of more than 8 bits a channel."""


def decode_folder(layout: Layout, image_size: int, bar: Bar = silent) -> DecodedFolder:
    """Decode all images to uint8 (N, 3, S, S), in one fixed shuffled order, with labels (N,).

    Raises InputError for images that cannot be decoded, and for classes that do not fit.

    >>> decode_folder(find_layout(Path("photos")), image_size=224).classes
    ('cat', 'dog')
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which change no pixel
        found = _look_into(layout, bar)
        classes, said = _classes(layout, found)
        scale = _scale(found, said)
        traits: Counter[str] = Counter()
        count = sum(len(files) for listing in found.images.values() for files in listing.values())
        check_free(
            3.0 * count * image_size**2,
            f"{layout.source}: {count} images of {image_size} px",
            "give a smaller image_size, or fewer images",
        )
        splits = {
            split: _decode(split, [listing.get(name, []) for name in classes], image_size, scale, traits, layout, bar)
            for split, listing in found.images.items()
        }
    return DecodedFolder(classes, splits, said | peculiarities(traits, sum(map(len, splits.values()))))


def _look_into(layout: Layout, bar: Bar) -> _Found:
    """Tell images from other files by their content."""
    places = [(split, name, f) for split, classes in layout.splits.items() for name in classes for f in classes[name]]
    found, bad = _Found(), dict[Path, str]()
    with bar("looking into files", len(places), "images") as advance:
        for (split, name, file), result in zip(places, in_threads(inspect_image, (p[2] for p in places)), strict=True):
            match result:
                case BadImageError():
                    bad[file] = str(result)
                case NotAnImageError():
                    found.left_out.setdefault(split, {}).setdefault(name, []).append(file)
                case _:
                    found.images.setdefault(split, {}).setdefault(name, []).append(file)
                    found.deep += [] if result is None else [result]
            advance(1)
    _refuse(bad, layout)
    return found


def _classes(layout: Layout, found: _Found) -> tuple[tuple[str, ...], dict[str, str]]:
    """Settle on the classes that have training images; refuse those that only other splits have."""
    train = found.images.get("train", {})
    said = {}
    out_of_reach = [
        (name, files)
        for name, files in found.left_out.get("train", {}).items()
        if name not in train and any(file.suffix.lower() in OTHER_PICTURES for file in files)
    ]
    if out_of_reach:
        name, files = out_of_reach[0]
        raise InputError(f"class {name!r} holds no image that can be read, but {_kinds(files)}")
    if not train:
        if layout.table is not None:
            raise InputError(f"{layout.table} names no file for training that is an image; see its path column")
        raise InputError(f"{layout.root} holds class folders without images: expected {layout.root}/CLASS/IMAGE")
    for split in found.images:
        if strange := [name for name in found.images[split] if name not in train]:
            raise InputError(
                f"{found.images[split][strange[0]][0]} is a {split} image of class {strange[0]!r}, of which there are "
                f"no training images{nearest(strange[0], train) or '; add some, or move it elsewhere'}"
            )
    check_two_classes(layout.source, train)
    if len(train) > MOST_CLASSES:
        raise InputError(
            f"{layout.source} holds {len(train)} classes, of which {MOST_CLASSES} are the limit: join some"
        )
    if empty := sorted({name for classes in layout.splits.values() for name in classes} - train.keys()):
        said["classes left out"] = f"no images lie in {some(empty)}"
    files = list(chain(*(files for classes in found.left_out.values() for files in classes.values())))
    reasons = [f"files that are no images: {len(files)} ({_kinds(files)})"] if files else []
    reasons += [f"images in no class folder: {layout.loose}"] if layout.loose else []
    if reasons:
        said["left out"] = "; ".join(reasons)
    return tuple(sorted(train)), said


def _kinds(files: list[Path]) -> str:
    """Count files by ending, with what would make them readable."""
    kinds = Counter(file.suffix.lower() for file in files)
    return some(
        f"{count} {kind or 'without ending'}" + (f": {OTHER_PICTURES[kind]}" if kind in OTHER_PICTURES else "")
        for kind, count in sorted(kinds.items(), key=lambda each: (-each[1], not each[0], each[0]))
    )


def _scale(found: _Found, said: dict[str, str]) -> Scale:
    """Choose one scale for all images of more than 8 bits a channel."""
    if not found.deep:
        return Scale(0, 255)
    low, high = min(low for low, _ in found.deep), max(high for _, high in found.deep)
    scale = Scale.of(low, high)
    said["image depth"] = (
        f"{len(found.deep)} images hold more than 8 bits a channel, values {low:g} to {high:g} in all: "
        f"{scale.low:g} becomes black and {scale.high:g} white"
    )
    return scale


def _decode(
    split: str,
    by_class: list[list[Path]],
    image_size: int,
    scale: Scale,
    traits: Counter[str],
    layout: Layout,
    bar: Bar,
) -> LabelledImages:
    files = [file for files in by_class for file in files]
    order = generator(0, "folder order", split).permutation(len(files))
    labels = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class])[order]
    pixels = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    bad: dict[Path, str] = {}
    decode = partial(decode_image, image_size=image_size, scale=scale)
    with bar(f"decoding {split} images", len(files), "images") as advance:
        for place, result in enumerate(in_threads(decode, (files[i] for i in order))):
            if isinstance(result, Square):
                pixels[place] = torch.from_numpy(result.pixels).permute(2, 0, 1)
                traits.update(result.traits)
            else:
                bad[files[order[place]]] = str(result)
            advance(1)
    _refuse(bad, layout)
    owners = None
    if layout.owners is not None and split == "train":
        owners = torch.tensor([layout.owners[files[i]] for i in order])
    return LabelledImages(pixels, torch.from_numpy(labels), owners)


def _refuse(bad: dict[Path, str], layout: Layout) -> None:
    """Name images that cannot be read; all were tried, so that one message does for all."""
    if not bad:
        return
    first, *others = sorted(bad)
    raise InputError(
        f"{first} is not a readable image ({bad[first]}){nor_others([layout.short(file) for file in others])}: "
        f"mend it, or move it out of {layout.source}"
    )


def peculiarities(traits: Counter[str], total: int) -> dict[str, str]:
    """Say what was decided about transparent, animated and large images."""
    sentences = {
        "transparent": ("transparent images", "are transparent in part, and lie on white"),
        "several": ("animated images", "hold several pictures, of which the first one counts"),
        "large": ("large images", f"have more than {LARGE / 1e6:.0f} megapixels, and were decoded at reduced size"),
    }
    return {what: f"{traits[trait]} of {total} {says}" for trait, (what, says) in sentences.items() if traits[trait]}


def in_threads(do: Callable[[Path], T], files: Iterable[Path]) -> Iterator[T | BadImageError | NotAnImageError]:
    """Give what ``do`` makes of each file, in order, or the error that says why it cannot."""

    def tried(file: Path) -> T | BadImageError | NotAnImageError:
        try:
            return do(file)
        except (BadImageError, NotAnImageError) as error:
            return error

    with ThreadPoolExecutor() as threads:
        waiting: deque[Future[T | BadImageError | NotAnImageError]] = deque()
        try:
            for file in files:
                waiting.append(threads.submit(tried, file))
                if len(waiting) > IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # stopped by Ctrl-C, say
            for future in waiting:
                future.cancel()
