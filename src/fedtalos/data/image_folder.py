"""Image folders: one folder per class, read as people keep them, decoded once to a cached tensor file.

Letters: N images, S pixels a side.
"""

import hashlib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.data.class_names import alike, some
from fedtalos.data.decoding import LARGE, Square, decode_image, inspect_image
from fedtalos.data.deep_images import Scale
from fedtalos.data.folder_cache import LIMIT, Entry, cache_folder, source_name
from fedtalos.data.folder_layout import Files, Layout, check_two_classes, find_layout
from fedtalos.data.image_files import OTHER_PICTURES, BadImageError, NotAnImageError, can_read
from fedtalos.data.images import LabelledImages, Published
from fedtalos.errors import InputError
from fedtalos.notes import note
from fedtalos.progress import Bar, silent
from fedtalos.randomness import generator

RECIPE = 1
"""Number of the way images are decoded; another one makes old entries of the cache void."""
T = TypeVar("T")


@dataclass
class Found:
    """Images of a folder, by split and class, after a look into each file."""

    images: dict[str, Files]
    deep: dict[Path, tuple[float, float]] = field(default_factory=dict)
    """Least and greatest value of the images of more than 8 bits a channel."""
    left_out: list[Path] = field(default_factory=list)
    """Files that are no images."""


def read_image_folder(
    folder: Path, image_size: int, bar: Bar = silent, *, cache_dir: Path | None = None
) -> Published:
    """Read class names and images of uint8 (N, 3, S, S): training, and test and validation where there are folders.

    The shorter side is scaled to S = ``image_size`` and the middle square is kept. Images lie in one fixed shuffled
    order, so that the first n are of mixed classes. The first call decodes the images and keeps them under
    ``cache_dir`` (None: $FEDTALOS_CACHE, or the user's cache folder). Later calls read them there, until a file is
    added, removed or changed. Notes say what was left out, and what was decided.

    Raises InputError, which names the file or folder at fault.

    >>> photos = read_image_folder(Path("photos"), image_size=224)
    >>> photos.classes, len(photos.train)
    (('cat', 'dog'), 140)
    """
    if image_size < 1:
        raise InputError(f"image_size {image_size}: expected at least 1 pixel")
    layout = find_layout(folder)
    entry = _entry(layout, image_size, cache_folder(cache_dir))
    if (published := _from_cache(entry, image_size)) is None:
        with entry.alone(bar):
            published = _from_cache(entry, image_size) or _decoded(layout, entry, image_size, bar)
    splits, classes, said = published
    for what, sentence in (layout.said | said).items():
        note(what, sentence)
    note("images", "; ".join(_counts(name, images.labels, classes) for name, images in splits.items()))
    return Published(classes, splits["train"], splits.get("test"), splits.get("val"))


Kept = tuple[dict[str, LabelledImages], tuple[str, ...], dict[str, str]]
"""Images by split, class names, and sentences about what was decided."""


def _entry(layout: Layout, image_size: int, cache: Path) -> Entry:
    """Find the place of these files, as they are now, in the cache."""
    root = layout.root.resolve()
    source = hashlib.blake2b(repr((str(root), image_size)).encode(errors="surrogateescape"), digest_size=4)
    digest = hashlib.blake2b(repr((RECIPE, can_read(".heic"), can_read(".avif"))).encode(), digest_size=8)
    for split, classes in layout.splits.items():
        for name, files in classes.items():
            digest.update(repr((split, name)).encode())
            for file in files:
                stat = file.stat() if file.exists() else file.lstat()
                seen = (str(file.relative_to(layout.root)), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                digest.update(repr(seen).encode(errors="surrogateescape"))
    return Entry(cache, source_name(root, image_size, source.hexdigest()), digest.hexdigest())


def _from_cache(entry: Entry, image_size: int) -> Kept | None:
    if (kept := entry.load()) is None:
        return None
    tensors, facts = kept
    try:
        classes, said = tuple(map(str, facts["classes"])), {str(k): str(v) for k, v in facts["said"].items()}
        splits = {}
        for name in facts["splits"]:
            pixels, labels = tensors[f"{name}_pixels"], tensors[f"{name}_labels"]
            shape = (len(labels), 3, image_size, image_size)
            if pixels.dtype != torch.uint8 or pixels.shape != shape or labels.dtype != torch.int64:
                return None
            if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(classes):
                return None
            splits[name] = LabelledImages(pixels, labels)
        return (splits, classes, said) if "train" in splits else None
    except (KeyError, TypeError, AttributeError, RuntimeError):
        return None


def _decoded(layout: Layout, entry: Entry, image_size: int, bar: Bar) -> Kept:
    """Decode all images, and keep them in the cache if that can be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which change no pixel
        found = _found(layout, bar)
        classes, said = _classes(layout, found)
        scale = _scale(found, said)
        traits: Counter[str] = Counter()
        tensors: dict[str, Tensor] = {}
        for split, listing in found.images.items():
            pixels, labels = _decode(split, listing, classes, image_size, scale, traits, bar)
            tensors |= {f"{split}_pixels": pixels, f"{split}_labels": labels}
    total = sum(len(files) for listing in found.images.values() for files in listing.values())
    said |= _peculiarities(traits, total)
    facts = {"classes": classes, "said": said, "splits": list(found.images)}
    if (why := entry.save(tensors, facts)) is not None:
        note(
            "image cache",
            f"the decoded images could not be kept ({why}), so the next run decodes them again; cache_dir takes another "
            "folder",
        )
    else:
        note("image cache", f"decoded images are kept in {entry.folder}, {LIMIT / 1e9:g} GB at most")
    splits = {name: LabelledImages(tensors[f"{name}_pixels"], tensors[f"{name}_labels"]) for name in found.images}
    return splits, classes, said
