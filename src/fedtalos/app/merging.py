"""The vectors of a run merged: what rules want of the clients' images, and the factor that validation images choose."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice

import torch
from torch import Tensor

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.app.run.holders import Holders, MergeWeights, WeighedBy, weights_sent
from fedtalos.app.run.kept import Unit
from fedtalos.data.images import LabelledImages
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import ClosedForm, Head, head_of, set_head
from fedtalos.training.editing.alpha_search import best_alpha
from fedtalos.training.editing.merging import merge
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.evaluation import evaluate
from fedtalos.training.head_fitting import fit_head
from fedtalos.training.masked_parameters import MaskedParameters


@dataclass(frozen=True)
class Merger:
    """Makes one vector of those of a run's units, by the run's rule, from where they started."""

    loaded: Loaded[FederatedConfig]
    holders: Holders
    moving: MaskedParameters
    start: Tensor
    """Values (A,) and head that every unit started from."""
    head: Head

    def merged(self, units: Sequence[Unit], vectors: Sequence[TaskVector]) -> TaskVector:
        """One vector of several; the model is left as it was.

        The mean counts images. Fisher and RegMean weigh by sums over the images of the units' clients, each taken with
        the unit's own model.
        """
        rule, seed = self.loaded.config.apart.merge, self.loaded.config.run.seed
        if rule == "mean":
            images = [sum(int(self.holders.clients.sizes[client]) for client in unit.members) for unit in units]
            return merge(vectors, rule, weights=images)
        if rule == "fisher":
            return merge(vectors, rule, scores=self._sums(rule, units, vectors))
        if rule == "regmean":
            return merge(vectors, rule, moments=self._sums(rule, units, vectors))
        return merge(vectors, rule, seed=seed)

    def traffic(self, units: Sequence[Unit]) -> tuple[int, int]:
        """Bytes that the rule takes beyond the vectors, down to clients and up from them.

        A client that trained by itself has its vector's model; several get what they came to together.
        """
        rule, clients = self.loaded.config.apart.merge, sum(len(unit.members) for unit in units)
        if rule != "fisher" and rule != "regmean":
            return 0, 0
        sums = torch.float32.itemsize * sum(weights_sent(self.moving, rule).values())
        asked = sum(len(unit.members) for unit in units if len(unit.members) > 1)
        return self.moving.nbytes * asked, sums * clients

    def _sums(self, rule: WeighedBy, units: Sequence[Unit], vectors: Sequence[TaskVector]) -> list[MergeWeights]:
        """Each unit's sums over its clients, under its own model with the first head."""
        model, now = self.loaded.model, self.moving.vector()
        head = head_of(model)
        set_head(model, *self.head, source=model.head_source)  # where the head moves, the units' values have it
        models = (
            (client, self.start + vector.values.to(self.start.device))
            for unit, vector in zip(units, vectors, strict=True)
            for client in unit.members
        )
        weights = self.holders.weights(rule, models)
        found = [reduce(_added, islice(weights, len(unit.members))) for unit in units]
        set_head(model, *head, source=model.head_source)
        self.moving.write(now)
        return found


def that_sent(units: Sequence[Unit], vectors: Sequence[TaskVector]) -> tuple[list[Unit], list[TaskVector]]:
    """Leave out units that sent nothing, whose vectors are 0 all over, so that they have no say; all, if none did."""
    sent = [(unit, vector) for unit, vector in zip(units, vectors, strict=True) if vector.values.any()]
    return ([unit for unit, _ in sent], [vector for _, vector in sent]) if sent else (list(units), list(vectors))


def _added(first: MergeWeights, second: MergeWeights) -> MergeWeights:
    return {name: tensor + second[name] for name, tensor in first.items()}


def factor(
    loaded: Loaded[FederatedConfig],
    merged: TaskVector,
    val: LabelledImages | None = None,
    *,
    refit: ClosedForm | None = None,
) -> float:
    """The factor on a merged vector: as asked, or by accuracy on ``val`` (None: the validation images).

    Where a head will be fitted anew (``refit``: its kind), the first head would ask for too small a factor. Then each
    factor is measured with a head fitted to the server's calibration images, which nobody has to send anything for.
    The model holds the vectors' base, and is left as it was.
    """
    asked = loaded.config.apart.merge_alpha
    if asked != "auto":
        return asked
    images, calibration = loaded.limited("val") if val is None else val, loaded.data.calibration
    batch_size, precision = loaded.config.data.eval_batch_size, loaded.config.run.arithmetic

    def accuracy(edited: Backbone) -> float:
        if refit is not None and len(calibration):
            fit_head(edited, calibration, refit, val=images)
        return evaluate(edited, images, batch_size=batch_size, precision=precision).accuracy

    return best_alpha(loaded.model, merged, accuracy).alpha
