"""Batches of holders side by side, as a stack trains on them: from images, or from what frozen stages make of them.

Shapes: V holders, B images of a batch.
"""

from collections.abc import Sequence

import numpy as np

from fedtalos.data.batches import stacked_batches
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.training.engine.ahead import one_ahead
from fedtalos.training.feature_cache import plain_source
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.loop import Batches
from fedtalos.training.masked_parameters import MaskedParameters


def stages_passed(moving: MaskedParameters, local: LocalTraining) -> int:
    """Count the first stages whose output is kept and trained on; augmented images need them anew each time."""
    return moving.frozen_stages if local.augmentation == "none" else 0


def batches_of(
    moving: MaskedParameters,
    local: LocalTraining,
    images: LabelledImages,
    ids: Sequence[Ids],
    rngs: Sequence[np.random.Generator],
    *,
    steps: int,
    first: int = 0,
) -> Batches:
    """Draw ``steps`` batches of V holders, (V, B, ...) and (V, B), the very ones that each would draw by itself.

    ``ids`` and ``rngs`` have one entry per holder. Batches before number ``first`` are drawn, but not given. Each batch
    is good until the next one is asked for.

    >>> batches = batches_of(moving, local, images, [ids], [generator(0, "batches", 1, 0)], steps=4)
    """
    kept = stages_passed(moving, local) > 0
    source = moving.source(images, ids) if kept else plain_source(moving.model, images)
    drawn = stacked_batches(
        source.images,
        ids,
        source.view,
        steps=steps,
        batch_size=local.batch_size,
        augmentation=local.augmentation,
        rngs=rngs,
        first=first,
    )
    return one_ahead(drawn, moving.device)
