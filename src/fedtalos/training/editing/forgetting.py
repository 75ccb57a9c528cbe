"""Forgetting: a vector that was added is taken away again, and more of it where that is asked for.

Task negation: Ilharco et al., ICLR 2023 (arXiv 2212.04089), section 3. The target is to be lost, control is to stay.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.notes import note
from fedtalos.training.editing.task_vectors import TaskVector, check_fits, write_edit
from fedtalos.training.evaluation import evaluate

Measure = Callable[[Backbone], tuple[float, float]]
"""Accuracy of a model: on the target, and on control."""
COARSE = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Factors to begin with; the edge of control is then found by halving."""
HALVINGS = 4


@dataclass(frozen=True, eq=False)
class Forgotten:
    """A model that forgot, the factor that its vector was subtracted with, and accuracies before and after, 0 to 1."""

    model: Backbone
    alpha: float
    target_before: float
    target: float
    control_before: float
    control: float

    @property
    def control_share(self) -> float:
        """Control accuracy, as a share of that before."""
        return self.control / self.control_before if self.control_before else 1.0


def forget(
    model: Backbone,
    vector: TaskVector,
    target: LabelledImages,
    control: LabelledImages,
    *,
    alpha: float | None = None,
    keep: float = 0.95,
) -> Forgotten:
    """Subtract ``alpha`` times ``vector`` from a copy of the model, and measure what that still knows.

    ``alpha`` None: the factor that leaves least of the target, of those that leave at least the share ``keep`` of the
    control accuracy, about ten evaluations. ``target`` and ``control`` are images to choose by, so report figures on
    others.

    Raises InputError for a vector of another model, and for a ``keep`` that is no share.

    >>> found = forget(model, tau_of_cats, cats, all_but_cats)
    >>> found.target, found.control_share
    (0.02, 0.96)
    """
    check_fits(vector, model)

    def measure(edited: Backbone) -> tuple[float, float]:
        return evaluate(edited, target).accuracy, evaluate(edited, control).accuracy

    before = measure(model)
    if alpha is None:
        alpha = forgetting_factor(model, vector, measure, before[1], keep)
    edited = copy.deepcopy(model)
    write_edit(edited, model, vector, -alpha)
    after = measure(edited)
    return Forgotten(edited, alpha, before[0], after[0], before[1], after[1])


def forgetting_factor(
    model: Backbone, vector: TaskVector, measure: Measure, control_before: float, keep: float = 0.95
) -> float:
    """Find the factor >= 0 that leaves least of the target while control is at least ``keep`` of ``control_before``.

    0 is tried too, so control is never given up for nothing; of factors that leave equally little, the smallest. It is
    noted where that is the largest factor tried: a larger may forget more.

    >>> alpha = forgetting_factor(model, vector, measure, control_before=0.7)
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep {keep}: expected a share of control, above 0 and at most 1, such as 0.95")
    edited, found = copy.deepcopy(model), dict[float, tuple[float, float]]()

    def allowed(alpha: float) -> bool:
        write_edit(edited, model, vector, -alpha)
        found[alpha] = measure(edited)
        return found[alpha][1] >= keep * control_before

    low, high = 0.0, 0.0
    if allowed(low):
        for high in COARSE:
            if not allowed(high):
                break
            low = high
        for _ in range(HALVINGS if low < high else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if allowed(middle) else (low, middle)
    kept = [alpha for alpha, (_, control) in found.items() if control >= keep * control_before]
    best = min(kept, key=lambda alpha: (found[alpha][0], alpha), default=0.0)
    if best == COARSE[-1]:
        note("alpha of forgetting", f"{best:g}, the largest tried, leaves control alone; a larger may forget more")
    return best
