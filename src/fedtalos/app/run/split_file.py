"""split.npz, a federated run's record of who holds which training image."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtalos.app.config.schema import SplitOptions
from fedtalos.errors import InputError
from fedtalos.files import write_atomic
from fedtalos.training.federated.clients import Clients, Integers


@dataclass(frozen=True, eq=False)
class Manifest:
    """Content of split.npz: client and label (N,) of every training image, and the names of the classes (C,)."""

    client: Integers
    label: Integers
    classes: tuple[str, ...]


def describe_split(options: SplitOptions) -> str:
    """Describe a split in a few words, e.g. "label_skew of 5 classes each"; mask files record it."""
    detail = {"label_skew": f" of {options.classes_per_client} classes each", "iid": ""}
    return options.partition + detail.get(options.partition, f" of alpha {options.alpha:g}")


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
    try:
        content = io.BytesIO(path.read_bytes())
        if any(member.compress_type != zipfile.ZIP_STORED for member in zipfile.ZipFile(content).infolist()):
            raise ValueError("packed, so that it may be larger than it looks")
        with np.load(content, allow_pickle=False) as arrays:
            client, label, classes = (arrays[name] for name in ("client", "label", "classes"))
        whole = client.dtype.kind == label.dtype.kind == "u" and classes.dtype.kind == "U"
        if not (whole and client.ndim == classes.ndim == 1 and client.shape == label.shape and len(client)):
            raise ValueError("other arrays")
        if label.max() >= len(classes):
            raise ValueError("a class without a name")
    except Exception as error:  # numpy and zipfile raise nearly anything over a damaged file
        raise InputError(
            f"{path}: expected client and label of every training image, and classes; make the run anew"
        ) from error
    return Manifest(client, label, tuple(classes.tolist()))
