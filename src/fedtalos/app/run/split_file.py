"""Clients as the experiments see them: who holds which training images."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtalos.app.config.schema import SplitOptions
from fedtalos.app.run.folders import RunPaths
from fedtalos.app.setup import Setup
from fedtalos.errors import InputError
from fedtalos.files import write_atomic
from fedtalos.training.federated.clients import Clients, Integers
from fedtalos.training.federated.partition import partition


def split(setup: Setup, options: SplitOptions, seed: int) -> Clients:
    """The training images of every client, as the options share them out."""
    return partition(
        setup.dataset.train.labels.cpu().numpy(),
        scheme=options.partition,
        num_clients=options.num_clients,
        seed=seed,
        classes_per_client=options.classes_per_client,
        alpha=options.alpha,
        min_size=options.min_client_size,
    )


def in_words(options: SplitOptions) -> str:
    """How the images are shared out."""
    detail = {"label_skew": f" of {options.classes_per_client} classes each", "iid": ""}
    return options.partition + detail.get(options.partition, f" of alpha {options.alpha:g}")


@dataclass(frozen=True, eq=False)
class Manifest:
    """What split.npz holds: client and label (N,) of every training image, and the names of the classes (C,)."""

    client: Integers
    label: Integers
    classes: tuple[str, ...]


def write_split(paths: RunPaths, setup: Setup, clients: Clients) -> None:
    """split.npz: who holds which training image. How they were shared out, and of what data, is in config.yaml."""
    classes = np.array(setup.dataset.classes, dtype=np.str_)
    labels = setup.dataset.train.labels.cpu().numpy()
    content = io.BytesIO()
    np.savez(content, client=clients.owner, label=labels.astype(np.min_scalar_type(len(classes) - 1)), classes=classes)
    write_atomic(paths.results / "split.npz", content.getvalue())


def read_split(run_dir: Path) -> Manifest | None:
    """The split.npz of a run's folder; None where it has none, InputError where it is broken."""
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
