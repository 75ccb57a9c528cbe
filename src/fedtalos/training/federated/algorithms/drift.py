"""What keeps clients from drifting apart while they train alone: FedProx's pull, SCAFFOLD's control variates.

Both adjust gradients on their way to the optimiser. Shapes: K clients, A entries that move.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtalos.training.federated.fedavg import Outcome, TrainClients
from fedtalos.training.loop import Adjust, BadUpdateError
from fedtalos.training.masked_parameters import Entries, Values, named_tensors


def proximal(model: nn.Module, entries: Entries, mu: float) -> Adjust:
    """FedProx (Li et al., 2020): the gradient of mu/2 |theta_k - theta|^2 too, theta being what the model holds now."""
    tensors = named_tensors(model)
    theta = entries.gather(tensors)
    return lambda gradient: gradient.add_(entries.gather(tensors).sub_(theta), alpha=mu)


@dataclass(frozen=True)
class Exchange:
    """What SCAFFOLD's server and the clients of a round give each other beside theta, by client, (A,) each."""

    terms: dict[int, Tensor] = field(default_factory=dict)
    """c - c_k, which is added to the client's gradients."""
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """The mean of the client's own gradients over its steps, before anything was added."""

    def adjust(self, client: int, steps: int) -> Adjust:
        """The client's side: take its term, and leave the mean gradient of its ``steps`` steps."""
        term = self.terms.pop(client)
        mean = self.gradients[client] = torch.zeros_like(term)

        def add_term(gradient: Tensor) -> Tensor:
            mean.add_(gradient, alpha=1 / steps)
            return gradient.add_(term)

        return add_term


class Scaffold:
    """SCAFFOLD's server (Karimireddy et al., 2020, algorithm 1): control variates c and, of clients met, c_k.

    A client's new c_k is the mean of its gradients over its local steps: under plain SGD that is the paper's option
    II, c_k - c + (theta - theta_k) / (steps x rate); under another optimiser, a schedule or clipping it is still
    a gradient, which the option's difference is not. c is the mean of all K clients' c_k, weighted by their images.
    ``state`` holds "c" and "c_CLIENT": 4 A bytes for c and for each client met so far.
    """

    def __init__(self, exchange: Exchange, sizes: NDArray[np.integer[Any]], state: dict[str, Tensor]) -> None:
        self._exchange, self._state = exchange, state
        self._shares = sizes / sizes.sum()

    def controlled(self, entries: Entries, train_clients: TrainClients) -> TrainClients:
        """``train_clients`` with control variates, which take their new values once all of a round have trained.

        Those of a client whose training was of no use stay as they are.
        """
        state, exchange = self._state, self._exchange

        def train_controlled(number: int, clients: Sequence[int], theta: Values) -> Iterator[Outcome]:
            zero = theta.vector.new_zeros(len(entries))
            c = state.setdefault("c", zero.clone())
            exchange.gradients.clear()
            exchange.terms.clear()
            exchange.terms.update({client: c - state.get(f"c_{client}", zero) for client in clients})
            trained = list[int]()
            for client, outcome in zip(clients, train_clients(number, clients, theta), strict=True):
                if not isinstance(outcome, BadUpdateError):
                    trained.append(client)
                yield outcome
            for client in trained:
                new = exchange.gradients.pop(client)
                c.add_(new - state.get(f"c_{client}", zero), alpha=float(self._shares[client]))
                state[f"c_{client}"] = new

        return train_controlled
