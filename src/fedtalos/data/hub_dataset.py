"""Data sets of the Hugging Face hub, or saved by its library ``datasets``, decoded by the rules of image folders."""

import hashlib
from collections.abc import Iterable, Mapping
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
from fedtalos.data.images import Published
from fedtalos.data.named_clients import number_clients
from fedtalos.errors import InputError, install
from fedtalos.progress import Bar, silent

HUB = "hf:"
"""Beginning of the name of a data set of the hub."""
IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label", "class", "target", "character")
CLIENTS = ("client", "client_id", "writer_id", "user_id", "hospital")
"""Usual names of columns, in the order in which they are taken."""
SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder shows that ``save_to_disk`` wrote it."""


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
            f"dataset {name}: expected image=COLUMN, label=COLUMN or client=COLUMN after the comma, "
            f"got {','.join(named)}"
        )
    return place, columns


def _opened(name: str) -> Mapping[str, Any]:
    """Open the data set's splits, by name; one without splits is for training."""
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise InputError(f"dataset {name}: datasets cannot be imported ({error}); {install('datasets')}") from error
    place, _ = place_of(name)
    owner, _, config = place.partition("/")
    own, _, config = config.partition("/")
    folder = Path(place).expanduser()
    try:
        if folder.is_dir():
            saved = any((folder / file).is_file() for file in SAVED)
            found = (datasets.load_from_disk if saved else datasets.load_dataset)(str(folder))
        elif owner and own and "/" not in config:
            found = datasets.load_dataset(f"{owner}/{own}", config or None)
        else:
            raise InputError(f"dataset {name}: expected {HUB}OWNER/NAME, or a folder that datasets can read")
    except Exception as error:  # the library's, the hub's and those of broken files share no base
        if isinstance(error, InputError):
            raise
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"dataset {name}: cannot be read ({why}); check its name, and that the hub can be reached"
        ) from error
    return found if isinstance(found, dict) else {"train": found}


def _labelled(name: str, parts: Mapping[str, Any], said: dict[str, str]) -> dict[str, Any]:
    """Tell which of its parts are our splits."""
    splits: dict[str, Any] = {}
    for part, rows in parts.items():
        split = split_of(part)
        if split is None or split in splits or len(rows) == 0:
            said["splits left out"] = f"{part} ({len(rows)} images) of {some(parts)}"
        else:
            splits[split] = rows
    if "train" not in splits:
        raise InputError(f"dataset {name}: expected a split called train, got {some(parts) or 'none'}")
    return splits


def _columns(name: str, features: Mapping[str, Any], said: dict[str, str]) -> _Columns:
    """Find the columns of images, of labels and of clients, or take those that the name names."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    listed = some((f"{column} ({kind})" for column, kind in kinds.items()), most=6)
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    found = {
        "image": _usual((column for column, kind in kinds.items() if kind == "Image"), IMAGES),
        "label": _usual(classes or (column for column in LABELS if kinds.get(column) == "Value"), LABELS),
        "client": [column for column in CLIENTS if column in kinds],
    }
    for what, column in place_of(name)[1].items():
        if column not in (found[what] if what == "image" else kinds):
            raise InputError(f"dataset {name}: found no column {column} of {what}s among {listed}")
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
            raise InputError(f"dataset {name}: {str(error).replace(f'{folder}/', '')}") from error
    return DecodedFolder(decoded.classes, decoded.splits, layout.said | decoded.said)


def _list_images(name: str, split: str, rows: Any, columns: _Columns, layout: Layout, bar: Bar) -> None:
    """Add a split's images to the layout."""
    labels = _labels(rows, columns.label)
    if None in labels:
        if split == "train":
            raise InputError(f"dataset {name}: row {labels.index(None)} of train has no label")
        layout.said[f"{split} left out"] = f"row {labels.index(None)} of {split} has no label"
        return
    encoded = import_module("datasets").Image(decode=False)
    images = rows.select_columns([columns.image]).cast_column(columns.image, encoded)
    files: list[Path] = []
    (layout.root / split).mkdir()
    classes = layout.splits.setdefault(split, {})
    with bar(f"reading {split} images", len(labels), "images") as advance:
        for number, (row, label) in enumerate(zip(images, labels, strict=True)):
            image = row[columns.image] or {"bytes": b"", "path": None}
            file = Path(image["path"] or f"{number}.png")
            if image["bytes"] is not None:
                ending = file.suffix if file.suffix[1:].isalnum() and len(file.suffix) < 10 else ".png"
                file = layout.root / split / f"{number}{ending}"
                file.write_bytes(image["bytes"])
            files.append(file)
            classes.setdefault(class_name(label), []).append(file)
            advance(1)
    if split == "train" and columns.client is not None:
        names = [str(client) for client in rows[columns.client]]
        numbers, layout.said["clients"] = number_clients(names)
        layout.owners = dict(zip(files, numbers.tolist(), strict=True))


def _labels(rows: Any, column: str) -> list[Any]:
    """Take each row's class by its name; None where it has none: test sets without answers hold -1."""
    names, values = getattr(rows.features[column], "names", None), list(rows[column])
    if names is None:
        return [None if value is None else str(value) for value in values]
    return [None if value is None or value < 0 else names[value] for value in values]
