"""Clients as the experiments see them: who holds which training images, and the ridge head of all of them."""

import json
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from fedtalos.config import SplitOptions
from fedtalos.data.partition import class_counts, partition
from fedtalos.experiments.runs import RunPaths
from fedtalos.experiments.setup import Setup
from fedtalos.files import write_atomic

Clients = list[NDArray[np.int64]]
"""The training images (positions) of every client."""


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


def write_split(paths: RunPaths, setup: Setup, options: SplitOptions, clients: Clients) -> None:
    """split.json: which training images each client holds, by position, and how many of each class."""
    classes = setup.dataset.classes
    counts = class_counts(setup.dataset.train.labels.cpu().numpy(), clients, len(classes))
    manifest = {
        **options.model_dump(),
        "data": setup.dataset.fingerprint,
        "classes": classes,
        "class_counts": counts.tolist(),
        "clients": [ids.tolist() for ids in clients],
    }
    write_atomic(paths.results / "split.json", json.dumps(manifest))


def fit_ridge_head(setup: Setup, clients: Clients) -> int:
    """Fit the ridge head of all clients' sums (validation tunes it); returns the bytes that they sent."""
    sent = [setup.head_sums(setup.dataset.train.subset(ids)) for ids in clients]
    setup.fit_head(reduce(add, sent))
    return sum(sums.wire_bytes for sums in sent)
