"""Image folders: one folder per class, read as people keep them, decoded once to a cached tensor file.

Letters: N images, S pixels a side.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtalos.data.class_names import some
from fedtalos.data.folder_cache import LIMIT, Entry, Facts, cache_folder, source_name
from fedtalos.data.folder_decoding import DecodedFolder, decode_folder
from fedtalos.data.folder_layout import SPLITS, Layout, find_layout
from fedtalos.data.image_files import can_read
from fedtalos.data.images import LabelledImages, Published
from fedtalos.errors import InputError
from fedtalos.notes import note
from fedtalos.progress import Bar, silent

RECIPE = 1
"""Number of the way images are decoded; another one makes old entries of the cache void."""


def read_image_folder(folder: Path, image_size: int, bar: Bar = silent, *, cache_dir: Path | None = None) -> Published:
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
    check_image_size(image_size)
    return read_layout(find_layout(folder), image_size, bar, cache_dir=cache_dir)


def check_image_size(image_size: int) -> None:
    """Refuse images without pixels, with an InputError.

    >>> check_image_size(224)
    """
    if image_size < 1:
        raise InputError(f"image_size {image_size}: expected at least 1 pixel")


def read_layout(layout: Layout, image_size: int, bar: Bar = silent, *, cache_dir: Path | None = None) -> Published:
    """Read the images that a layout lists, as ``read_image_folder`` does.

    >>> photos = read_layout(find_layout(Path("photos")), image_size=224)
    """
    check_image_size(image_size)
    entry = _entry(layout, image_size, cache_folder(cache_dir))
    return kept_or_decoded(entry, image_size, lambda: decode_folder(layout, image_size, bar), layout.said, bar)


def kept_or_decoded(
    entry: Entry, image_size: int, decode: Callable[[], DecodedFolder], said: Mapping[str, str], bar: Bar = silent
) -> Published:
    """Take images from their entry in the cache, or else decode and keep them; ``said`` and more becomes notes.

    >>> photos = kept_or_decoded(entry, 224, lambda: decode_folder(layout, 224), layout.said)
    """
    if (decoded := _from_cache(entry, image_size)) is None:
        with entry.alone(bar):
            decoded = _from_cache(entry, image_size)  # by a run that was waited for
            if decoded is None:
                decoded = decode()
                _keep(decoded, entry)
    splits = decoded.splits
    for what, sentence in {**said, **decoded.said}.items():
        note(what, sentence)
    counts = (_counts(name, splits[name], decoded.classes) for name in SPLITS if name in splits)
    note("images", "; ".join(counts))
    return Published(decoded.classes, splits["train"], splits.get("test"), splits.get("val"))


def _entry(layout: Layout, image_size: int, cache: Path) -> Entry:
    """Find the place of these files, as they are now, in the cache."""
    root = layout.source.resolve()
    source = hashlib.blake2b(repr((str(root), image_size)).encode(errors="surrogateescape"), digest_size=4)
    digest = hashlib.blake2b(repr((RECIPE, can_read(".heic"), can_read(".avif"))).encode(), digest_size=8)
    for split, classes in layout.splits.items():
        for name, files in classes.items():
            digest.update(repr((split, name)).encode())
            for file in files:
                stat = file.stat() if file.exists() else file.lstat()
                seen = (layout.short(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                digest.update(repr(seen).encode(errors="surrogateescape"))
                if layout.owners is not None and split == "train":
                    digest.update(b"%d" % layout.owners[file])
    return Entry(cache, source_name(root, image_size, source.hexdigest()), digest.hexdigest())


def _keep(decoded: DecodedFolder, entry: Entry) -> None:
    """Put decoded images into the cache, or note why that cannot be."""
    tensors: dict[str, Tensor] = {}
    for name, images in decoded.splits.items():
        tensors |= {f"{name}_pixels": images.pixels, f"{name}_labels": images.labels}
        if images.owners is not None:
            tensors[f"{name}_owners"] = images.owners
    why = entry.save(tensors, Facts(decoded.classes, tuple(decoded.splits), decoded.said))
    if why is None:
        note("image cache", f"decoded images are kept in {entry.folder}, {LIMIT / 1e9:g} GB of them at most")
    else:
        note(
            "image cache",
            f"decoded images could not be kept ({why}): the next run decodes them again, unless cache_dir names "
            "another folder",
        )


def _from_cache(entry: Entry, image_size: int) -> DecodedFolder | None:
    """Read decoded images from the cache; None where they are not there, or are not what they should be."""
    if (kept := entry.load()) is None:
        return None
    tensors, facts = kept
    try:
        splits = {}
        for name in facts.splits:
            owners = tensors.get(f"{name}_owners")
            images = LabelledImages(tensors[f"{name}_pixels"], tensors[f"{name}_labels"], owners)
            fits = owners is None or (
                owners.dtype == torch.int64
                and owners.shape == images.labels.shape
                and 0 <= owners.min() <= owners.max() < len(images)
            )
            fits &= images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64
            fits &= images.pixels.shape == (len(images), 3, image_size, image_size) and len(images) > 0
            if not (fits and images.labels.min() >= 0 and images.labels.max() < len(facts.classes)):
                return None
            splits[name] = images
        return DecodedFolder(facts.classes, splits, facts.said) if "train" in splits else None
    except (KeyError, RuntimeError):
        return None


def _counts(split: str, images: LabelledImages, classes: tuple[str, ...]) -> str:
    """Count a split's images by class, in a few words."""
    counts = torch.bincount(images.labels, minlength=len(classes)).tolist()
    of = dict(zip(classes, counts, strict=True))
    has = sorted((count, name) for name, count in of.items() if count)
    if len(classes) <= 5:
        detail = ", ".join(f"{name} {count}" for name, count in of.items())
    else:
        (least, fewest), (most, greatest) = has[0], has[-1]
        detail = (
            f"{len(has)} classes of {least}"
            if least == most
            else (f"{len(has)} classes of {least} ({fewest}) to {most} ({greatest})")
        )
        if none := [name for name, count in of.items() if not count]:
            detail += f", none of {some(none)}"
    return f"{split} {len(images)}: {detail}"
