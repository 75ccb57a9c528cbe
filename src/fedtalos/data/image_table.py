"""Image tables: a CSV file of path and label, with client and split where the data have them."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import MaxLen, Predicate

from fedtalos.data.class_names import class_name, some
from fedtalos.data.folder_layout import SPLITS, Files, Layout, split_of
from fedtalos.data.image_folder import read_layout
from fedtalos.data.images import Published
from fedtalos.data.named_clients import number_clients
from fedtalos.errors import InputError, shown
from fedtalos.facts import read_table, table_schema
from fedtalos.progress import Bar, silent

MOST_BYTES, MOST_ROWS = 2**28, 3_000_000
"""Size of a table; ImageNet has 1.3 million images."""

Text = Annotated[str, MaxLen(255)]


@table_schema
@dataclass(frozen=True)
class _Row:
    """Columns of a table; others are passed over."""

    path: Annotated[str, MaxLen(4096), Predicate(lambda text: "\0" not in text)]
    label: Text
    client: Text = ""
    split: Text = ""


def read_image_table(table: Path, image_size: int, bar: Bar = silent, *, cache_dir: Path | None = None) -> Published:
    """Read the images that a CSV file names, as ``read_image_folder`` reads those of a folder.

    Raises InputError, which names the row or the image at fault.

    >>> photos = read_image_table(Path("photos/labels.csv"), image_size=224)
    >>> photos.classes, photos.train.owners
    (('cat', 'dog'), tensor([0, 0, 1, ...]))
    """
    return read_layout(table_layout(table), image_size, bar, cache_dir=cache_dir)


def table_layout(table: Path) -> Layout:
    """Read which images a CSV file names, their classes, splits and clients; no image is opened.

    Columns are path (from the table's folder on, or absolute) and label, and where they are there client and split
    (train, val or test, or a synonym). Clients are numbered in the order of their names, as numbers where all are.

    >>> table_layout(Path("photos/labels.csv")).splits["train"].keys()
    dict_keys(['cat', 'dog'])
    """
    _, rows = read_table(
        _Row, table, most_bytes=MOST_BYTES, most_rows=MOST_ROWS, expected="a path and a label", advice="mend the table"
    )
    if not rows:
        raise InputError(f"{table} names no images: expected the columns path and label, and a row for each image")
    layout = Layout(table.parent, table=table)
    splits = _splits(table, rows)
    files = _files(table, rows)
    found: dict[str, Files] = {split: {} for split in SPLITS if split in splits}
    if "train" not in found:
        raise InputError(f"{table} names no training images: expected rows whose split is train")
    for number, (row, split, file) in enumerate(zip(rows, splits, files, strict=True), 1):
        if not (label := row.label.strip()):
            raise InputError(f"{table}, row {number}: {row.path} has no label; give it one, or leave the row out")
        found[split].setdefault(class_name(label), []).append(file)
    layout.splits = {split: {name: sorted(own) for name, own in classes.items()} for split, classes in found.items()}
    layout.owners = _owners(layout, rows, splits, files)
    return layout


def _splits(table: Path, rows: list[_Row]) -> list[str]:
    """Tell each row's split; train for all where there is no such column."""
    if not any(row.split.strip() for row in rows):
        return ["train"] * len(rows)
    splits = []
    for number, row in enumerate(rows, 1):
        if (split := split_of(row.split.strip())) is None:
            raise InputError(f"{table}, row {number}: expected the split train, val or test, got {shown(row.split)}")
        splits.append(split)
    return splits


def _files(table: Path, rows: list[_Row]) -> list[Path]:
    """Find each row's file; one message does for all that are missing."""
    at: dict[str, int] = {}
    missing: list[str] = []
    for number, row in enumerate(rows, 1):
        place = os.path.normpath(row.path.strip()) if row.path.strip() else "."
        if place == os.pardir or place.startswith(os.pardir + os.sep):
            raise InputError(
                f"{table}, row {number}: {shown(row.path)} leads out of {table.parent}; write such a path in full"
            )
        place = os.path.join(table.parent, place)  # noqa: PTH118  Path would be slow for millions; absolute ones stay
        if (other := at.setdefault(place, number)) != number:
            raise InputError(f"{table}, rows {other} and {number} name one image, {shown(row.path)}; leave one out")
        if not _is_file(place):
            missing.append(f"row {number}: {shown(row.path)}")
    if missing:
        raise InputError(f"{table} names files that are not there ({some(missing)}); paths start from {table.parent}")
    return [Path(place) for place in at]


def _is_file(place: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(place).st_mode)  # noqa: PTH116
    except (OSError, ValueError):
        return False


def _owners(layout: Layout, rows: list[_Row], splits: list[str], files: list[Path]) -> dict[Path, int] | None:
    """Number the clients of the training images; None where the table has no such column."""
    train = [place for place, split in enumerate(splits) if split == "train"]
    names = [rows[place].client.strip() for place in train]
    if not any(names):
        return None
    if not all(names):
        raise InputError(
            f"{layout.table}, row {train[names.index('')] + 1}: a training image without client, where others have "
            "one; give it one, or take out the column"
        )
    numbers, layout.said["clients"] = number_clients(names)
    return dict(zip((files[place] for place in train), numbers.tolist(), strict=True))
