"""SCAFFOLD (Karimireddy et al., 2020, algorithm 1): control variates keep clients from drifting apart.

Shapes: K clients, A entries that move.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.training.entries import Values
from fedtalos.training.federated.algorithms.fedopt import FedAvgM
from fedtalos.training.federated.clients import Integers
from fedtalos.training.federated.fedavg import Trained
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters


class Control:
    """Add c - c_k to a client's gradients, and reply with the mean of its own over its steps; of a stack, (V, A)."""

    def __init__(self, term: Tensor, steps: int) -> None:
        self._term, self._steps = term, steps
        self.reply = torch.zeros_like(term)

    def __call__(self, gradient: Tensor) -> Tensor:
        self.reply.add_(gradient, alpha=1 / self._steps)
        return gradient.add_(self._term)


class Scaffold(FedAvgM):
    """SCAFFOLD: the server keeps control variates c and, of clients met, c_k, and sends c - c_k beside theta.

    A client's new c_k is the mean of its gradients over its local steps: under plain SGD that is the paper's option
    II, c_k - c + (theta - theta_k) / (steps x rate); under another optimiser, a schedule or clipping it is still
    a gradient, which the option's difference is not. c is the mean of all K clients' c_k, weighted by their images.
    ``state`` holds "c" and "c_CLIENT": 4 A bytes for c and for each client met so far. ``learning_rate`` is the
    server's step towards the mean.

    >>> rounds = fedavg(model, clients, local=LocalTraining(optimizer="sgd"), rounds=10, algorithm=Scaffold())
    """

    vectors_sent = 2
    corrects_gradients = True

    def __init__(self, learning_rate: float = 1.0) -> None:
        super().__init__(learning_rate, momentum=0.0)
        self._shares: NDArray[np.floating[Any]] = np.empty(0)

    def client_side(self, _trained: Trained, message: Tensor | None, steps: int) -> Control:
        assert message is not None
        return Control(message, steps)

    def weights(self, sizes: Integers, local: LocalTraining) -> NDArray[np.number[Any]]:
        self._shares = sizes / sizes.sum()
        return super().weights(sizes, local)

    def message(self, moving: MaskedParameters, client: int) -> Tensor:
        zero = torch.zeros(len(moving), device=moving.device)
        return self.state.get("c", zero) - self.state.get(f"c_{client}", zero)

    def server_side(self, moving: MaskedParameters, theta: Values, replies: Mapping[int, Tensor | None]) -> None:
        zero = torch.zeros(len(moving), device=moving.device)
        c = self.state.setdefault("c", zero.clone())
        for client, new in replies.items():
            assert new is not None
            c.add_(new - self.state.get(f"c_{client}", zero), alpha=float(self._shares[client]))
            self.state[f"c_{client}"] = new
        if self.learning_rate != 1:
            super().server_side(moving, theta, replies)
