"""One round: every client trains once from the same start, the vectors are merged, the head is fitted from sums.

Letters: U units (clients, or the clients of a task), A entries that move.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtalos.data.images import LabelledImages
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import ClosedForm
from fedtalos.training.evaluation import evaluate
from fedtalos.training.federated.apart import train_apart
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg
from fedtalos.training.federated.traffic import Traffic
from fedtalos.training.head_fitting import fit_head
from fedtalos.training.line_search import search_alpha
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters


@dataclass(frozen=True, eq=False)
class OneShot:
    """Vectors (U, A), the one that they were merged to (A,), its factor, and the bytes that were sent."""

    vectors: Tensor
    merged: Tensor
    alpha: float
    bytes_down: int
    bytes_up: int


def summed(vectors: Tensor) -> Tensor:
    """Add vectors (U, A) up: task arithmetic (Ilharco et al., 2023, arXiv 2212.04089, section 4).

    >>> summed(torch.ones(3, 2))
    tensor([3., 3.])
    """
    return vectors.sum(0)


def one_shot(
    model: Backbone | MaskedParameters,
    clients: Clients,
    mask: Mapping[str, Tensor] | None = None,
    *,
    local: LocalTraining,
    val: LabelledImages,
    calibration: LabelledImages | None = None,
    units: Sequence[Sequence[int]] | None = None,
    merge: Callable[[Tensor], Tensor] = summed,
    alpha: float | None = None,
    head: ClosedForm | None = "ridge",
    seed: int = 0,
) -> OneShot:
    """Train federatedly in one round; in the end the model holds start + alpha x merged, and a head fitted on that.

    Every unit (None: every client) trains once from the model as it is. ``merge`` makes one vector (A,) of theirs
    (U, A); ``alpha`` is its factor (None: the one that ``val`` is best with, searched as ``best_alpha`` does; 0 is
    tried, so the backbone is never worse on ``val`` than it was). Then the clients send sums over the merged model's
    features, without training, and ``head`` is fitted to them (None: it stays).

    The first head asks for too small a factor where a head is fitted afterwards. With images of the server's own
    (``calibration``) every factor is measured with a head that is fitted to them.

    >>> local = LocalTraining(epochs=2, learning_rate=1e-3)
    >>> found = one_shot(model, clients, mask, local=local, val=data.val, calibration=data.calibration)
    >>> found.alpha, evaluate(model, data.test).accuracy
    (0.75, 0.381)
    """
    moving = MaskedParameters.of(model, mask)
    start, vectors, traffic = moving.vector(), dict[int, Tensor](), Traffic(moving, FedAvg(), len(clients))
    rounds = train_apart(
        moving, clients, local=local, units=units, seed=seed, keep=lambda unit, vector: vectors.update({unit: vector})
    )
    sent = [traffic.count(round_) for round_ in rounds]
    stacked = torch.stack(list(vectors.values()))
    came = stacked.any(1)  # a client without images has no say
    merged = merge(stacked[came] if bool(came.any()) else stacked)

    def accuracy(alpha: float) -> float:
        moving.write(start + alpha * merged)
        if head is not None and calibration is not None:
            fit_head(moving.model, calibration, head, val=val)
        return evaluate(moving, val).accuracy

    alpha = search_alpha(accuracy).alpha if alpha is None else alpha
    moving.write(start + alpha * merged)
    down, up = (sum(column) for column in zip(*sent, strict=True))
    if head is not None:
        down += moving.nbytes * len(clients)  # the merged vector, on which they take their sums
        up += fit_head(moving.model, clients.images, head, holders=clients, val=val)
    return OneShot(stacked, merged, alpha, down, up)
