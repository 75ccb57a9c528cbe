"""Folder layouts: which folders are splits, which are classes, and which files lie below them.

Known layouts: DIR/CLASS, DIR/train/CLASS beside val and test folders, and DIR/CLASS/train. Names of splits have
synonyms, in any case (training, valid, dev, testing, eval ...). Files may lie at any depth below a class folder.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedtalos.data.class_names import class_name, some
from fedtalos.data.image_files import called_image
from fedtalos.errors import InputError

SPLITS = {
    "train": re.compile(r"train(ing)?", re.IGNORECASE),
    "val": re.compile(r"val(id(ation)?)?|dev", re.IGNORECASE),
    "test": re.compile(r"test(ing)?|eval(uation)?", re.IGNORECASE),
}
SUFFIX = re.compile(r"[ _-]?(set|data|images|imgs|split)$", re.IGNORECASE)
"""Words that may follow a split's name: train_images is train."""

JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found", "icon\r"}
"""Names of what systems leave in folders; like hidden files, these are passed over in silence."""

Files = dict[str, list[Path]]
"""Class name -> files below its folder that are not hidden, in a fixed order."""


@dataclass
class Layout:
    """A folder's splits by name (train, and val and test where they are there), their classes, and their files."""

    root: Path
    splits: dict[str, Files] = field(default_factory=dict)
    loose: int = 0
    """Images that lie in no class folder."""
    said: dict[str, str] = field(default_factory=dict)
    """Sentences about what was decided, by what they are about."""
    table: Path | None = None
    """File that names the images, whose folder is ``root``; None: they are all that lie below it."""
    owners: dict[Path, int] | None = None
    """Client of each training image, numbered from 0; None: the data know no clients."""

    @property
    def source(self) -> Path:
        """Path that the user named: the table, or the folder."""
        return self.table or self.root

    def short(self, file: Path) -> str:
        """Write a file's path from the root on, where it lies below it."""
        return str(file.relative_to(self.root) if file.is_relative_to(self.root) else file)


def find_layout(root: Path) -> Layout:
    """Find splits, classes and files below ``root``; no file is opened.

    Raises InputError where there are no class folders, no training images, or two folders for one split.

    >>> find_layout(Path("photos")).splits["train"].keys()
    dict_keys(['cat', 'dog'])
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give data_dir a folder of class folders of images")
    layout, again = Layout(root), list[Path]()
    folders = _folders(root)
    by_split, others = _split_folders(root, folders)
    if by_split:
        for split, folder in by_split.items():
            if classes := _named_folders(folder):
                layout.splits[split] = _class_files(classes, layout, again)
                layout.loose += _loose(folder)
            else:
                layout.said[f"{folder.name} left out"] = (
                    f"{folder} holds no class folders; without labels its {_loose(folder)} images are of no use here"
                )
        if others:
            names = some(folder.name for folder in others)
            layout.said["folders left out"] = f"{names}: beside those of splits, in {root}"
    elif (by_class := _splits_in_classes(folders)) is not None:
        layout.splits = {split: _class_files(classes, layout, again) for split, classes in by_class.items()}
    else:
        layout.splits["train"] = _class_files(_named_folders(root), layout, again)
        if pooled := [f for f in folders if len({split_of(each.name) for each in _folders(f)} - {None}) > 1]:
            layout.said["folders read together"] = f"all that lie in {some(map(str, pooled))}, as images of one class"
    if again:
        layout.said["links left out"] = f"{some(map(str, again))}: they lead to folders that are read already"
    layout.loose += _loose(root)
    if not layout.splits["train"]:
        if layout.loose:
            raise InputError(_unsorted(root, layout.loose))
        raise InputError(f"{root} holds no class folders: expected {root}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE")
    return layout


def check_two_classes(root: Path, names: Collection[str]) -> None:
    """Refuse one class alone, with an InputError.

    >>> check_two_classes(Path("photos"), ["cat", "dog"])
    """
    if len(names) > 1:
        return
    (name,) = names
    inside = root / name
    hint = (
        f" (or give data_dir {inside}, if its folders are the classes)" if inside.is_dir() and _folders(inside) else ""
    )
    raise InputError(f"{root} holds images of one class, {name!r}: a classifier needs two or more{hint}")


def split_of(name: str) -> str | None:
    """Name the split that a folder's name stands for.

    >>> split_of("Training"), split_of("val_images"), split_of("cat")
    ('train', 'val', None)
    """
    stem = SUFFIX.sub("", name)
    return next((split for split, pattern in SPLITS.items() if pattern.fullmatch(stem)), None)


def _split_folders(root: Path, folders: list[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Tell which folders hold splits, and which others lie beside them; no splits where these are class folders."""
    named: dict[str, list[Path]] = defaultdict(list)
    others: list[Path] = []
    for folder in folders:
        split = split_of(folder.name)
        (others if split is None else named[split]).append(folder)
    beside = any(called_image(file) for other in others for file in files_below(other))
    if not named or (beside and not (len(named) > 1 and any(map(_folders, named.get("train", []))))):
        return {}, []
    for split, same in named.items():
        if len(same) > 1:
            raise InputError(
                f"{same[0]} and {same[1]} both say that they hold the {split} images: rename one, or join them"
            )
    by_split = {split: same[0] for split, same in sorted(named.items())}
    if "train" not in by_split:
        raise InputError(
            f"{root} holds {some(map(str, by_split.values()))} and no train folder: add {root}/train/CLASS"
        )
    if not _folders(by_split["train"]):
        if not _loose(by_split["train"]):
            raise InputError(f"{by_split['train']} holds no class folders: expected {by_split['train']}/CLASS/IMAGE")
        raise InputError(_unsorted(by_split["train"], _loose(by_split["train"])))
    return by_split, others


def _splits_in_classes(folders: list[Path]) -> dict[str, list[tuple[str, Path]]] | None:
    """Find DIR/CLASS/train and the like; None: the folders in class folders are not all named for splits."""
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for folder in folders:
        inner = _folders(folder)
        splits = [split_of(each.name) for each in inner]
        if not inner or None in splits or _loose(folder) or len(set(splits)) < len(splits):
            return None
        for split, each in zip(splits, inner, strict=True):
            found[split or ""].append((folder.name, each))
    return found if "train" in found else None


def _class_files(classes: list[tuple[str, Path]], layout: Layout, again: list[Path]) -> Files:
    """List the files of each class; folders whose names differ in Unicode alone are one class.

    Links to folders that are read already go to ``again``.
    """
    files: Files = {}
    spelled: dict[str, str] = {}
    for folder_name, folder in sorted(classes, key=lambda pair: class_name(pair[0])):
        name = class_name(folder_name)
        if spelled.setdefault(name, folder_name) != folder_name:
            layout.said["class names"] = f"{name} is spelled in two Unicode forms; these folders are one class"
        files.setdefault(name, []).extend(files_below(folder, again))
    return files


def _unsorted(folder: Path, images: int) -> str:
    return f"{folder} holds {images} images and no class folders: put those of each class into {folder}/CLASS"


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from [e for e in entries if not e.name.startswith(".") and e.name.casefold() not in JUNK]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): mend that, or give another data_dir") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _folders(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in _visible(folder) if _is_folder(entry))


def _named_folders(folder: Path) -> list[tuple[str, Path]]:
    return [(each.name, each) for each in _folders(folder)]


def _loose(folder: Path) -> int:
    """Count the images that lie in a folder itself."""
    return sum(called_image(Path(entry.name)) and not _is_folder(entry) for entry in _visible(folder))


def files_below(folder: Path, again: list[Path] | None = None) -> list[Path]:
    """List the files at any depth, links followed, but none back to where they came from: these go to ``again``."""
    found: list[Path] = []
    above = folder.parent.resolve()
    seen = {_identity(each) for each in (above, *above.parents)}
    left = [folder]
    while left:
        at = left.pop()
        if (identity := _identity(at)) in seen:
            if again is not None:
                again.append(at)
            continue
        seen.add(identity)
        for entry in _visible(at):
            (left if _is_folder(entry) else found).append(Path(entry.path))
    return sorted(found, key=lambda file: [unicodedata.normalize("NFC", part) for part in file.parts])


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
