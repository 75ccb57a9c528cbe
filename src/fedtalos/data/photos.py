"""Photos: image files picked by name, folder or pattern, decoded by the rules of training.

Letters: N images, S pixels a side.
"""

import glob
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedtalos.data.class_names import class_name, nor_others, some
from fedtalos.data.decoding import Square, decode_image, inspect_image
from fedtalos.data.deep_images import Scale
from fedtalos.data.folder_decoding import in_threads, peculiarities
from fedtalos.data.folder_layout import files_below, find_layout
from fedtalos.data.image_files import BadImageError, NotAnImageError
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError, nearest, shown
from fedtalos.notes import note
from fedtalos.progress import Bar, silent

BYTES = Scale(0, 255)
"""The scale of images of 8 bits a channel."""


@dataclass(frozen=True)
class Photos:
    """Image files that can be read, and the scale of those of more than 8 bits a channel.

    >>> photos = open_photos(["holiday/", "cat.jpg"])
    >>> [pixels.shape for pixels in photos.batches(image_size=224, batch_size=64)]
    [torch.Size([3, 3, 224, 224])]
    """

    files: tuple[Path, ...]
    scale: Scale = BYTES

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, image_size: int, batch_size: int, bar: Bar = silent) -> Iterator[Tensor]:
        """Decode the middle squares to uint8 (B, 3, S, S), batch by batch, with S = ``image_size``.

        Raises InputError for a file that cannot be decoded.
        """
        traits: Counter[str] = Counter()
        decode = partial(decode_image, image_size=image_size, scale=self.scale)
        with warnings.catch_warnings(), bar("decoding images", len(self), "images") as advance:
            warnings.simplefilter("ignore")  # of odd metadata, which change no pixel
            squares: list[Tensor] = []
            for file, result in zip(self.files, in_threads(decode, self.files), strict=True):
                if not isinstance(result, Square):
                    raise _unreadable({file: str(result)})
                traits.update(result.traits)
                squares.append(torch.from_numpy(result.pixels).permute(2, 0, 1))
                advance(1)
                if len(squares) == batch_size:
                    yield torch.stack(squares)
                    squares = []
            if squares:
                yield torch.stack(squares)
        for what, sentence in peculiarities(traits, len(self)).items():
            note(what, sentence)


def open_photos(places: str | Path | Iterable[str | Path], bar: Bar = silent) -> Photos:
    """Find image files, and look into each: files, folders (at any depth below), and patterns such as "*/2024-*.jpg".

    Files below folders that are no images are left out, and a note says how many; files that are named must be images.

    Raises InputError where a place is not there or holds no image, and for an image that cannot be decoded.

    >>> len(open_photos(["holiday/", "cat.jpg"]))
    3
    """
    places = [places] if isinstance(places, str | Path) else list(places)
    if not places:
        raise InputError("images: expected files, folders or patterns, got none")
    files: dict[Path, bool] = {}
    for place in map(Path, places):
        for file, named in _found(place):
            files[file] = files.get(file, False) or named
    return _looked_into(list(files), {file for file, named in files.items() if named}, bar)


def read_labelled_folder(folder: Path, classes: Sequence[str], image_size: int, bar: Bar = silent) -> LabelledImages:
    """Read a folder of class folders as one set of images of known ``classes``, to evaluate a model on.

    The folders' names tell the class; some of the classes are enough. Images lie in the order of classes and files.

    Raises InputError for a folder of another class, and as ``open_photos`` does.

    >>> images = read_labelled_folder(Path("holiday"), ("cat", "dog"), image_size=224)
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give a folder of class folders of images")
    layout = find_layout(folder)
    if len(layout.splits) > 1:
        raise InputError(f"{folder} holds splits ({', '.join(layout.splits)}): give one of their folders")
    labels = {class_name(name): label for label, name in enumerate(classes)}
    by_class = {name: files for name, files in layout.splits["train"].items() if files}
    if not by_class:
        raise InputError(f"{folder} holds class folders without images: expected {folder}/CLASS/IMAGE")
    if strange := [name for name in by_class if name not in labels]:
        raise InputError(
            f"{folder / strange[0]} is no class that the model knows{nearest(strange[0], labels)}; "
            f"its {len(classes)} classes are {some(classes)}"
        )
    label_of = {file: labels[name] for name, files in by_class.items() for file in files}
    photos = _looked_into(list(label_of), set(), bar)
    pixels = torch.cat(list(photos.batches(image_size, 256, bar)))
    return LabelledImages(pixels, torch.tensor([label_of[file] for file in photos.files]))


def _found(place: Path) -> Iterator[tuple[Path, bool]]:
    """The files that a place means, and whether each was named itself."""
    if place.is_dir():
        found = files_below(place)
        if not found:
            raise InputError(f"{place} holds no files: give a folder of images")
        yield from ((file, False) for file in found)
    elif place.exists() or place.is_symlink() or not glob.has_magic(str(place)):
        if not place.is_file():
            raise InputError(f"{place}: no such image or folder; give files, folders, or a pattern in quotes")
        yield place, True
    else:
        pattern = re.sub(r"(\*\*/)+", "**/", str(place))  # the same files, found once
        matching = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  "/x/*" too
        if not matching:
            raise InputError(f"{shown(str(place))}: no file is called so; mend the pattern")
        for match in matching:
            yield from _found(match) if match.is_dir() else [(match, False)]


def _looked_into(files: Sequence[Path], named: set[Path], bar: Bar) -> Photos:
    """Keep the files that are images; refuse broken ones, and named ones that are something else."""
    kept, left_out, bad, deep = [], [], dict[Path, str](), []
    with warnings.catch_warnings(), bar("looking into files", len(files), "images") as advance:
        warnings.simplefilter("ignore")
        for file, result in zip(files, in_threads(inspect_image, files), strict=True):
            match result:
                case NotAnImageError() if file not in named:
                    left_out.append(file)
                case BadImageError() | NotAnImageError():
                    bad[file] = str(result)
                case _:
                    kept.append(file)
                    deep += [] if result is None else [result]
            advance(1)
    if bad:
        raise _unreadable(bad)
    if not kept:
        raise InputError(f"images: none of {some(map(str, left_out))} is an image; give images")
    if left_out:
        note("left out", f"files that are no images: {len(left_out)} ({some(map(str, left_out))})")
    if not deep:
        return Photos(tuple(kept))
    scale = Scale.of(min(low for low, _ in deep), max(high for _, high in deep))
    note(
        "image depth",
        f"{len(deep)} images hold more than 8 bits a channel: {scale.low:g} becomes black and {scale.high:g} white, "
        "by these images alone",
    )
    return Photos(tuple(kept), scale)


def _unreadable(bad: dict[Path, str]) -> InputError:
    first, *others = sorted(bad)
    why = bad[first] or "no format that is read here"
    return InputError(f"{first} is not a readable image ({why}){nor_others([str(file) for file in others])}")
