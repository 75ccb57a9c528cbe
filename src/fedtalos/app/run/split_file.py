"""split.npz, a federated run's record of who holds which training image."""

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from fedtalos.app.config.schema import SplitOptions
from fedtalos.data.sampling import Ids
from fedtalos.errors import InputError
from fedtalos.facts import MOST_CLASSES, read_file
from fedtalos.files import write_atomic
from fedtalos.training.federated.clients import Clients, Integers, class_counts

MOST_BYTES = 2**28
"""Bytes of a split.npz; of 10 million images it has 80 million at most."""
MOST_HEADER = 10_000
"""Bytes of an array's header, as numpy itself has it."""
MOST_IMAGES = 2**24
"""Images of a split; ImageNet-21k has 14 million."""
LONGEST = 4 * 255
"""Bytes of a class's name, 4 a character."""
MOST_CLIENTS, MOST_SHOWN = 200, 1000
"""Clients and classes that are drawn, the first ones: a client's column is five pixels wide then."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """Content of split.npz: client and label (N,) of every training image, and the names of the classes (C,)."""

    client: Integers
    label: Integers
    classes: tuple[str, ...]


def describe_split(options: SplitOptions) -> str:
    """Describe a split in a few words, e.g. "label_skew of 5 classes each"; mask files record it."""
    detail = {"label_skew": f" of {options.classes_per_client} classes each", "iid": "", "given": ""}
    return options.partition + detail.get(options.partition, f" of alpha {options.alpha:g}")


def split_title(partition: str, classes_per_client: int | None, alpha: float | None) -> str:
    """Name a split in plain words.

    >>> split_title("label_skew", 2, None)
    '2 classes per client'
    """
    known = {
        "iid": "IID",
        "given": "the data's own clients",
        "label_skew": f"{classes_per_client} class{'' if classes_per_client == 1 else 'es'} per client",
        "dirichlet": f"Dirichlet, alpha {alpha}",
        "quantity": "unequal amounts",
    }
    return known.get(partition, partition)


def write_split(run_dir: Path, clients: Clients, classes: Sequence[str]) -> None:
    """Write split.npz to a run's folder, whose config.yaml says of which data it is, and by which scheme."""
    names = np.array(classes, dtype=np.str_)
    labels = clients.images.labels.cpu().numpy()
    content = io.BytesIO()
    np.savez(content, client=clients.owner, label=labels.astype(np.min_scalar_type(len(names) - 1)), classes=names)
    write_atomic(run_dir / "split.npz", content.getvalue())


def read_split(run_dir: Path) -> Manifest | None:
    """Read the split.npz of a run's folder; None where there is none, InputError where it is broken."""
    path = run_dir / "split.npz"
    if not path.is_file():
        return None
    broken = f"{path}: expected client and label of every training image, and classes"
    content = io.BytesIO(read_file(path, str(path), most=MOST_BYTES, advice="make the run anew"))
    try:
        _check_sizes(content)
        content.seek(0)
        with np.load(content, allow_pickle=False) as arrays:
            client, label, classes = (arrays[name] for name in ("client", "label", "classes"))
        whole = client.dtype.kind == label.dtype.kind == "u" and classes.dtype.kind == "U"
        if not (whole and client.ndim == classes.ndim == 1 and client.shape == label.shape and len(client)):
            raise ValueError("other arrays")
        if label.max() >= len(classes) or client.max() >= len(client):
            raise ValueError("a class without a name, or more clients than images")
        names = tuple(map(str, classes.tolist()))
    except Exception as error:  # numpy and zipfile raise nearly anything over a damaged file
        raise InputError(f"{broken}; make the run anew") from error
    return Manifest(client.astype(np.uint32), label.astype(np.uint32), names)


def counts_shown(split: Manifest) -> tuple[Ids, str]:
    """Count the images of each client and class (K, C) that a figure has room for; also says which these are.

    >>> counts, which = counts_shown(read_split(Path("results/mine")))
    >>> which
    'the first 200 of 1,000 clients'
    """
    clients, classes = int(split.client.max()) + 1, len(split.classes)
    rows, columns = min(clients, MOST_CLIENTS), min(classes, MOST_SHOWN)
    there = split.label < columns
    counts = class_counts(split.client[there], split.label[there], rows, columns)
    which = f"{clients} clients" if rows == clients else f"the first {rows} of {clients:,} clients"
    return counts, which if columns == classes else f"{which}, the first {columns} of {classes:,} classes"


def _check_sizes(content: io.BytesIO) -> None:
    """Compare what each array is to take with the bytes that it has; ValueError where it is packed, or says more."""
    with zipfile.ZipFile(content) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("packed, so that it may be larger than it looks")
        if len(members) != 3 or sum(member.file_size for member in members) > content.getbuffer().nbytes:
            raise ValueError("other arrays")
        for member in members:
            with archive.open(member) as file:
                if npy.read_magic(file) != (1, 0):
                    raise ValueError("another format")
                shape, _, dtype = npy.read_array_header_1_0(file, max_header_size=MOST_HEADER)
                if math.prod(shape) * dtype.itemsize != member.file_size - file.tell() or dtype.itemsize == 0:
                    raise ValueError("arrays of another size than they say")
                most = MOST_CLASSES if dtype.kind == "U" else MOST_IMAGES
                if len(shape) != 1 or shape[0] > most or (dtype.kind == "U" and dtype.itemsize > LONGEST):
                    raise ValueError("too many names or images, or names that are too long")
