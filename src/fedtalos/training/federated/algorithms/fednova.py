"""FedNova (Wang et al., 2020): clients count by their direction, not by how many steps they took.

Shapes: K clients, A entries that move.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.training.entries import Values
from fedtalos.training.federated.clients import Integers
from fedtalos.training.federated.fedavg import FedAvg
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters


def local_progress(steps: int, momentum: float) -> float:
    """a_k: how far ``steps`` steps of SGD go where every gradient, and the learning rate, is 1.

    The number of steps without momentum; (Wang et al., 2020, section 4.1) with it.

    >>> local_progress(4, momentum=0.0)
    4.0
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


class FedNova(FedAvg):
    """FedNova (Wang et al., 2020, equation 7): theta <- theta + (sum p_k a_k) sum p_k (theta_k - theta) / a_k.

    p_k is the client's share of the round's images, a_k its ``local_progress``. With equal a_k all is FedAvg, to the
    bit.

    >>> rounds = fedavg(model, clients, local=LocalTraining(epochs=1, optimizer="sgd"), rounds=10, algorithm=FedNova())
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: Integers = np.empty(0, np.int64)
        self._progress: NDArray[np.floating[Any]] = np.empty(0)

    def weights(self, sizes: Integers, local: LocalTraining) -> NDArray[np.number[Any]]:
        momentum = local.momentum if local.optimizer == "sgd" else 0.0
        progress = np.array([local_progress(local.steps_for(max(1, int(size))), momentum) for size in sizes])
        self._sizes, self._progress = sizes, progress / progress[0]  # only ratios count; equal ones become exactly 1
        return self._sizes / self._progress

    def server_side(self, moving: MaskedParameters, theta: Values, replies: Mapping[int, Tensor | None]) -> None:
        sizes, progress = self._sizes[list(replies)], self._progress[list(replies)]
        factor = float((sizes * progress).sum() * (sizes / progress).sum() / sizes.sum(dtype=np.float64) ** 2)
        mean = moving.vector()
        moving.load(theta)
        moving.write(torch.lerp(moving.vector(), mean, factor))
