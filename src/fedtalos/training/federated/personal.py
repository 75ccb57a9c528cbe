"""Personal accuracy: how each client fares with a model, and with one fine-tuned on its own images.

A client has no test images of its own: the test set is weighted with the classes that the client trains on.
Shapes: K clients, N training images, C classes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.devices import Precision
from fedtalos.errors import BadUpdateError
from fedtalos.models.backbone import Backbone
from fedtalos.randomness import generator
from fedtalos.training.confusion import confusion
from fedtalos.training.federated.clients import Clients
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

Accuracies = NDArray[np.float64]


def personalised(
    moving: MaskedParameters,
    clients: Clients,
    chosen: Sequence[int],
    local: LocalTraining,
    seed: int,
    alpha: float = 1.0,
) -> Iterator[int]:
    """Fine-tune the model for each of the ``chosen`` clients in turn; yields the client that it is tuned for now.

    Every client starts from the model as it is, and the model is as it was in the end. ``alpha`` is the share of the
    client's own vector, what fine-tuning changed, that its model has: 0 is the global model, 1 the fine-tuned one.
    Raises BadUpdateError where training diverges.

    >>> for client in personalised(moving, clients, [0, 7], LocalTraining(steps=20), seed=0):
    ...     print(client, evaluate(model, own_test_images[client]).accuracy)
    """
    theta = moving.copy()
    try:
        for client in chosen:
            moving.load(theta)
            try:
                local.run(moving, clients.images, clients[client], generator(seed, "personal batches", client))
            except BadUpdateError as error:
                raise BadUpdateError(f"personalising for client {client}: {error}") from error
            if alpha != 1:
                tuned = moving.vector()
                moving.load(theta)
                moving.write(torch.lerp(moving.vector(), tuned, alpha))
            yield client
    finally:
        moving.load(theta)


def with_own_vectors(moving: MaskedParameters, vectors: Mapping[int, Tensor], alpha: float = 1.0) -> Iterator[int]:
    """Add ``alpha`` times each client's own vector (A,) to the model in turn; yields the client that it is for now.

    The vectors are those that ``train_apart`` left, say. The model is as it was in the end.

    >>> for client in with_own_vectors(moving, vectors, alpha=0.5):
    ...     print(client, evaluate(model, own_test_images[client]).accuracy)
    """
    theta, start = moving.copy(), moving.vector()
    try:
        for client, vector in vectors.items():
            moving.write(start + alpha * vector.to(start.device))
            yield client
    finally:
        moving.load(theta)


def accuracy_by_class(
    model: Backbone,
    images: LabelledImages,
    classes: Ids,
    *,
    batch_size: int = 250,
    precision: Precision = "fp32",
) -> Accuracies:
    """Accuracy (C,) in each of these classes; nan in others, and where there is no image."""
    wanted = torch.isin(images.labels, torch.as_tensor(classes, device=images.labels.device))
    shown = images.subset(wanted.nonzero().squeeze(1))
    found = confusion(model, shown, batch_size=batch_size, precision=precision)
    return _ratio(found.correct.numpy(), found.examples.numpy())


def accuracy_by_client(clients: Clients, by_class: Accuracies) -> Accuracies:
    """Accuracy that each client can expect, (K,): the mean over its images of their classes' accuracy (C,).

    A class whose accuracy is nan does not count; nan for a client
    without another.
    """
    expected = by_class[clients.images.labels.cpu().numpy()]
    known = ~np.isnan(expected)
    owner = clients.owner[known]
    sums = np.bincount(owner, weights=expected[known], minlength=len(clients))
    return _ratio(sums, np.bincount(owner, minlength=len(clients)))


def mean_and_worst(accuracies: Accuracies) -> dict[str, float]:
    """Mean over clients, and over the tenth of them (at least one) that fares worst; clients of nan are left out."""
    known = np.sort(accuracies[~np.isnan(accuracies)])
    if len(known) == 0:
        return {"mean": math.nan, "worst_10_percent": math.nan}
    worst = known[: math.ceil(len(known) / 10)]
    return {"mean": round(float(known.mean()), 6), "worst_10_percent": round(float(worst.mean()), 6)}


def _ratio(sums: NDArray[Any], counts: NDArray[np.int64]) -> Accuracies:
    """sums / counts, nan where there is nothing to count."""
    out = np.full(len(sums), np.nan)
    np.divide(sums, counts, out=out, where=counts > 0)
    return out
