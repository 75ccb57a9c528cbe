"""FedProx (Li et al., 2020): clients are pulled back to the global values while they train.

Shapes: A entries that move, (A,), or (V, A) of V clients that train in one stack.
"""

from torch import Tensor

from fedtalos.training.federated.aggregation import WeightedMean
from fedtalos.training.federated.fedavg import FedAvg, MakeAggregation, Trained


class Pull:
    """Add the gradient of mu/2 |theta_k - theta|^2, theta being what ``trained`` holds when this is made."""

    reply = None

    def __init__(self, trained: Trained, mu: float) -> None:
        self._trained, self._mu, self._theta = trained, mu, trained.vector()

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient.add_(self._trained.vector().sub_(self._theta), alpha=self._mu)


class FedProx(FedAvg):
    """FedProx (Li et al., 2020, algorithm 2), with one mu for all clients; the server is FedAvg's.

    >>> rounds = fedavg(model, clients, local=local, rounds=10, algorithm=FedProx(mu=0.01))
    """

    corrects_gradients = True

    def __init__(self, mu: float = 0.01, *, aggregation: MakeAggregation = WeightedMean) -> None:
        super().__init__(aggregation=aggregation)
        self.mu = mu

    def client_side(self, trained: Trained, _message: Tensor | None, _steps: int) -> Pull:
        return Pull(trained, self.mu)
