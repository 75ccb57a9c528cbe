"""Merging the vectors of a run, and the factor that its validation images choose."""

from collections.abc import Sequence

from fedtalos.app.config.apart import MergeRule
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.data.images import LabelledImages
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.alpha_search import best_alpha
from fedtalos.training.editing.merging import merge
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.evaluation import evaluate


def merged_by(rule: MergeRule, vectors: Sequence[TaskVector], images: Sequence[int], seed: int) -> TaskVector:
    """One vector of several by a rule that looks at no images; ``images`` are how many each was trained on."""
    return merge(vectors, rule, weights=images if rule == "mean" else None, seed=seed)


def factor(loaded: Loaded[FederatedConfig], merged: TaskVector, val: LabelledImages | None = None) -> float:
    """The factor on a merged vector: as asked, or by accuracy on ``val`` (None: the validation images).

    The model holds the vectors' base, and is left as it was.
    """
    asked = loaded.config.apart.merge_alpha
    if asked != "auto":
        return asked
    images = loaded.limited("val") if val is None else val
    batch_size, precision = loaded.config.data.eval_batch_size, loaded.config.run.arithmetic

    def accuracy(edited: Backbone) -> float:
        return evaluate(edited, images, batch_size=batch_size, precision=precision).accuracy

    return best_alpha(loaded.model, merged, accuracy).alpha
