"""Heads fitted in closed form on a model's features, pooled or from holders' sums.

Shapes: N images, D width of the features, C classes.
"""

from collections.abc import Iterable, Iterator
from functools import reduce
from operator import add

import numpy as np

from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids, stratified_sample
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import ClosedForm, HeadSums, best_head, head_sums, set_head
from fedtalos.randomness import generator
from fedtalos.training.feature_cache import FeatureStore


def fit_head(
    model: Backbone,
    images: LabelledImages,
    kind: ClosedForm = "ridge",
    *,
    holders: Iterable[Ids] | None = None,
    val: LabelledImages | None = None,
    features: FeatureStore | None = None,
) -> int:
    """Give the model a head in closed form: ridge regression, or nearest class means (ncm); returns bytes sent.

    ``holders`` are the ids of the images that each client has (Clients are such); every client sends sums, which add up
    to those of the pooled images. Penalty and temperature are chosen on ``val``, else on a fifth of the images, which
    is then left out of the sums.

    Sources: Fed3R (Fani et al., 2024, arXiv 2406.01116), FedNCM (Legate et al., 2023, arXiv 2306.03937).

    >>> fit_head(model, data.calibration)
    >>> fit_head(model, data.train, holders=split_clients(data.train, 100), val=data.val)
    """
    features = features or FeatureStore()
    held = [np.arange(len(images))] if holders is None else list(holders)
    if val is None:
        out = stratified_sample(images.labels.cpu().numpy(), 0.2, generator(0, "head validation"))
        held, val = [np.setdiff1d(ids, out) for ids in held], images.subset(out)
    total = reduce(add, holder_sums(model, images, held, kind, features))
    fit_to_sums(model, total, val, kind, features)
    return len(held) * total.wire_bytes


def holder_sums(
    model: Backbone, images: LabelledImages, holders: Iterable[Ids], kind: ClosedForm, features: FeatureStore
) -> Iterator[HeadSums]:
    """Sums of each holder over the model's features of its images; those of several add up.

    >>> total = reduce(add, holder_sums(model, data.train, clients, "ridge", FeatureStore()))
    """
    classes = model.architecture.num_classes
    return (head_sums(kind, *features.features(model, images, ids), classes) for ids in holders)


def fit_to_sums(model: Backbone, sums: HeadSums, val: LabelledImages, kind: ClosedForm, features: FeatureStore) -> None:
    """Give the model the head that ``sums`` fix; penalty and temperature are chosen on ``val``.

    >>> fit_to_sums(model, total, data.val, "ridge", FeatureStore())
    """
    set_head(model, *best_head(kind, sums, *features.features(model, val)), source=kind)
