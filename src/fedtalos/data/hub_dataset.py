"""Data sets of the Hugging Face hub, or saved by its library ``datasets``, decoded by the rules of image folders."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedtalos.data.class_names import class_name, some
from fedtalos.data.folder_cache import Entry, cache_folder, source_name
from fedtalos.data.folder_decoding import DecodedFolder, decode_folder
from fedtalos.data.folder_layout import Layout, split_of
from fedtalos.data.image_files import can_read
from fedtalos.data.image_folder import RECIPE, check_image_size, kept_or_decoded
from fedtalos.data.image_table import MOST_ROWS
from fedtalos.data.images import Published
from fedtalos.data.named_clients import number_clients
from fedtalos.errors import InputError, install, printable, shortened, shown
from fedtalos.facts import MOST_CHARACTERS, MOST_CLASSES, memory_up_to, refusal
from fedtalos.progress import Bar, silent

HUB = "hf:"
"""Beginning of the name of a data set of the hub."""
IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label", "class", "target", "character")
CLIENTS = ("client", "client_id", "writer_id", "user_id", "hospital")
"""Usual names of columns, in the order in which they are taken."""
SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder shows that ``save_to_disk`` wrote it."""
FORMATS = ("parquet", "arrow", "imagefolder", "webdataset")
"""Formats that hold images, by the library's names."""
MOST_MEMORY = 2**32
"""Bytes that the library may take to unpack files: it reads a group of rows at a time, which has some 100 MB."""
ON_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/([^/]+))?")
"""OWNER/NAME, and a configuration."""


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str
    client: str | None


def read_hub_dataset(name: str, image_size: int, bar: Bar = silent, *, cache_dir: Path | None = None) -> Published:
    """Read the images of hf:OWNER/NAME, hf:OWNER/NAME/CONFIG, or hf:FOLDER that the library can read.

    The column of images is the one of that type, and that of labels the one of classes, or else one of a usual name; a
    client column says whose the images are. A name may name them: hf:OWNER/NAME,label=breed,client=owner.
    Decoded images are kept as those of folders are (``read_image_folder``).

    Raises InputError where the library is missing, the data set cannot be read, or has no such columns.

    >>> photos = read_hub_dataset("hf:flwrlabs/femnist", image_size=28)
    """
    check_image_size(image_size)
    said: dict[str, str] = {}
    splits = _labelled(name, _opened(name), said)
    columns = _columns(name, splits["train"].features, said)
    parts = {split: rows._fingerprint for split, rows in splits.items()}
    facts = (RECIPE, can_read(".heic"), can_read(".avif"), columns, parts)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    source = hashlib.blake2b(repr((name, image_size)).encode(), digest_size=4).hexdigest()
    label = Path(name.removeprefix(HUB).strip("/").replace("/", "_"))
    entry = Entry(cache_folder(cache_dir), source_name(label, image_size, source), digest)
    return kept_or_decoded(entry, image_size, lambda: _decoded(name, splits, columns, image_size, bar), said, bar)


def place_of(name: str) -> tuple[str, dict[str, str]]:
    """Take a name apart: the place on the hub or the folder, and the columns that it names.

    >>> place_of("hf:me/pets,label=breed")
    ('me/pets', {'label': 'breed'})
    """
    place, *named = name.removeprefix(HUB).split(",")
    columns = dict((what.partition("=")[::2]) for what in named)
    if not all(columns.values()) or not columns.keys() <= {"image", "label", "client"}:
        raise InputError(
            f"dataset {shortened(name, 80)}: expected image=COLUMN, label=COLUMN or client=COLUMN after the comma, "
            f"got {shortened(','.join(named), 80)}"
        )
    return place, columns


def _opened(name: str) -> Mapping[str, Any]:
    """Open the data set's splits, by name; one without splits is for training."""
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise InputError(f"dataset {name}: datasets cannot be imported ({error}); {install('datasets')}") from error
    place, _ = place_of(name)
    on_hub = ON_HUB.fullmatch(place)
    with _told(name), memory_up_to(MOST_MEMORY):
        folder = Path(place).expanduser()
        if folder.is_dir():
            saved = any((folder / file).is_file() for file in SAVED)
            found = datasets.load_from_disk(str(folder)) if saved else _prepared(name, str(folder), None)
        elif on_hub is not None:
            found = _prepared(name, *on_hub.groups())
        else:
            raise InputError(f"dataset {name}: expected {HUB}OWNER/NAME, or a folder that datasets can read")
    return found if isinstance(found, dict) else {"train": found}


def _prepared(name: str, place: str, config: str | None) -> Any:
    """Fetch a data set and let the library read it; its readers of other formats than FORMATS are never begun."""
    builder = import_module("datasets").load_dataset_builder(place, config)
    if builder.name not in FORMATS:
        raise InputError(f"dataset {name}: its files are {builder.name}: expected {', '.join(FORMATS)}")
    builder.download_and_prepare()
    return builder.as_dataset()


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what the library raises in the block into an InputError; errors of it, the hub and files share no base."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        says = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error
        why = str(says).strip().partition("\n")[0] or type(says).__name__
        advice = "check its name, and that the hub can be reached"
        raise refusal(f"dataset {name}: cannot be read", why, advice) from error


def _labelled(name: str, parts: Mapping[str, Any], said: dict[str, str]) -> dict[str, Any]:
    """Tell which of its parts are our splits."""
    splits: dict[str, Any] = {}
    left: list[str] = []
    for part, rows in parts.items():
        split = split_of(part)
        if split is None or split in splits or len(rows) == 0:
            left.append(f"{part} ({len(rows)} images)")
        else:
            splits[split] = rows
    if left:
        said["splits left out"] = f"{some(left)} of {some(parts)}"
    if "train" not in splits:
        raise InputError(f"dataset {name}: expected a split called train, got {_listed(parts) or 'none'}")
    if (count := sum(map(len, splits.values()))) > MOST_ROWS:
        raise InputError(f"dataset {name}: holds {count} images, of which {MOST_ROWS} are the limit; give another")
    return splits


def _columns(name: str, features: Mapping[str, Any], said: dict[str, str]) -> _Columns:
    """Find the columns of images, of labels and of clients, or take those that the name names."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    listed = _listed(f"{shortened(printable(column), 20)} ({kind})" for column, kind in kinds.items())
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    found = {
        "image": _usual((column for column, kind in kinds.items() if kind == "Image"), IMAGES),
        "label": _usual(classes or (column for column in LABELS if kinds.get(column) == "Value"), LABELS),
        "client": [column for column in CLIENTS if column in kinds],
    }
    for what, column in place_of(name)[1].items():
        if column not in (found[what] if what == "image" else kinds):
            raise InputError(f"dataset {name}: found no column {shortened(column, 40)} of {what}s among {listed}")
        found[what] = [column, *(other for other in found[what] if other != column)]
    for what in ("image", "label"):
        if not found[what]:
            raise InputError(f"dataset {name}: found no column of {what}s among {listed}; name it: {what}=COLUMN")
    (image, *images), (label, *labels), client = found["image"], found["label"], next(iter(found["client"]), None)
    said["columns"] = f"images are in {image}, classes in {label}" + (
        f", clients in {client}" if client is not None else ""
    )
    if images or labels:
        said["columns"] += f"; {some([*images, *labels])} are not read"
    return _Columns(image, label, client)


def _listed(names: Iterable[str]) -> str:
    """List a few names in a sentence that is to be short."""
    return some((shortened(printable(name), 40) for name in names), most=4)


def _usual(columns: Iterable[str], names: tuple[str, ...]) -> list[str]:
    """Sort columns, those of usual names first."""
    return sorted(columns, key=lambda column: names.index(column) if column in names else len(names))


def _decoded(name: str, splits: Mapping[str, Any], columns: _Columns, image_size: int, bar: Bar) -> DecodedFolder:
    """Decode all images, from files that are written for it where they are none."""
    with TemporaryDirectory(prefix="fedtalos-") as folder:
        layout = Layout(Path(folder), table=Path(name))
        for split, rows in splits.items():
            _list_images(name, split, rows, columns, layout, bar)
        try:
            decoded = decode_folder(layout, image_size, bar)
        except InputError as error:
            raise InputError(f"dataset {name}: {str(error).replace(f'{folder}{os.sep}', '')}") from error
    return DecodedFolder(decoded.classes, decoded.splits, layout.said | decoded.said)


def _list_images(name: str, split: str, rows: Any, columns: _Columns, layout: Layout, bar: Bar) -> None:
    """Add a split's images to the layout."""
    labels = _labels(name, rows, columns.label)
    if None in labels:
        if split == "train":
            raise InputError(f"dataset {name}: row {labels.index(None)} of train has no label")
        layout.said[f"{split} left out"] = f"row {labels.index(None)} of {split} has no label"
        return
    files: list[Path] = []
    (layout.root / split).mkdir()
    classes = layout.splits.setdefault(split, {})
    with bar(f"reading {split} images", len(labels), "images") as advance:
        for number, (image, label) in enumerate(zip(_images(name, rows, columns.image), labels, strict=True)):
            file = Path(image["path"] or f"{number}.png")
            if image["bytes"] is not None:
                ending = file.suffix if file.suffix[1:].isalnum() and len(file.suffix) < 10 else ".png"
                file = layout.root / split / f"{number}{ending}"
                file.write_bytes(image["bytes"])
            elif not _is_its_own(name, file):
                raise InputError(
                    f"dataset {name}: row {number} of {split} means {shown(str(file))}, which is none of its own files"
                )
            files.append(file)
            classes.setdefault(label, []).append(file)
            advance(1)
    if split == "train" and columns.client is not None:
        with _told(name):
            names = [str(client) for client in rows[columns.client]]
        numbers, layout.said["clients"] = number_clients(names)
        layout.owners = dict(zip(files, numbers.tolist(), strict=True))


def _images(name: str, rows: Any, column: str) -> Iterator[dict[str, Any]]:
    """Give each row's image: its bytes, else a path."""
    with _told(name):
        encoded = import_module("datasets").Image(decode=False)
        images = iter(rows.select_columns([column]).cast_column(column, encoded))
    for _ in range(len(rows)):
        with _told(name):
            image = next(images)[column] or {"bytes": b"", "path": None}
        yield image


def _is_its_own(name: str, file: Path) -> bool:
    """Tell whether a file lies in the data set's folder, or where the library keeps what it fetched."""
    from huggingface_hub import constants

    folder = Path(place_of(name)[0]).expanduser()
    kept = import_module("datasets").config.HF_DATASETS_CACHE
    places = (os.path.abspath(place) for place in (folder, kept, constants.HF_HUB_CACHE))  # noqa: PTH100
    return any(Path(os.path.abspath(file)).is_relative_to(place) for place in places)  # noqa: PTH100


def _labels(name: str, rows: Any, column: str) -> list[Any]:
    """Take each row's class by its name; None where it has none: test sets without answers hold -1.

    Raises InputError where a row's class is none or has no fit name, and for too many classes.
    """
    with _told(name), memory_up_to(MOST_MEMORY):
        names, values = getattr(rows.features[column], "names", None), list(rows[column])
    head = f"dataset {name}: {shortened(printable(column), 40)} holds"
    if names is None:
        labels = [None if value is None else str(value) for value in values]
    elif (highest := max((value for value in values if value is not None), default=0)) >= len(names):
        raise InputError(f"{head} class {highest}, of {len(names)} classes from 0 on")
    else:
        labels = [None if value is None or value < 0 else str(names[value]) for value in values]
    if (count := len(set(labels))) > MOST_CLASSES:
        raise InputError(f"{head} {count} classes, of which {MOST_CLASSES} are the limit")
    if odd := [label for label in labels if label is not None and not 0 < len(label) <= MOST_CHARACTERS]:
        raise InputError(f"{head} a name of {len(odd[0])} characters: expected 1 to {MOST_CHARACTERS}")
    try:
        spelled = {label: class_name(label) for label in labels if label is not None}
    except InputError as error:
        raise InputError(f"{head} what names no class: {error}") from error
    return [None if label is None else spelled[label] for label in labels]
