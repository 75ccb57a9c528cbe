"""Server optimisers: FedAvgM (Hsu et al., 2019), FedAdagrad, FedAdam and FedYogi (Reddi et al., 2021).

Clients are FedAvg's. Delta = mean - theta is the server's pseudo-gradient, with the sign of a step. Shapes: A entries
that move; frozen entries are never seen here.
"""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from fedtalos.training.entries import Values
from fedtalos.training.federated.aggregation import WeightedMean
from fedtalos.training.federated.fedavg import FedAvg, MakeAggregation
from fedtalos.training.masked_parameters import MaskedParameters


class ServerOptimizer(FedAvg):
    """A server that makes a step of its own out of theta and the clients' mean."""

    @abstractmethod
    def step(self, theta: Tensor, mean: Tensor) -> Tensor:
        """The new theta (A,) from theta (A,) and the mean (A,)."""

    def server_side(self, moving: MaskedParameters, theta: Values, _replies: Mapping[int, Tensor | None]) -> None:
        mean = moving.vector()
        moving.load(theta)
        moving.write(self.step(moving.vector(), mean))


class FedAvgM(ServerOptimizer):
    """FedAvgM (Hsu, Qi and Brown, 2019): v <- momentum v + Delta, theta <- theta + learning_rate v.

    Learning rate 1 and momentum 0 give the mean itself, to the bit: FedAvg.

    >>> rounds = fedavg(model, clients, local=local, rounds=10, algorithm=FedAvgM(momentum=0.9))
    """

    def __init__(
        self, learning_rate: float = 1.0, momentum: float = 0.9, *, aggregation: MakeAggregation = WeightedMean
    ) -> None:
        super().__init__(aggregation=aggregation)
        self.learning_rate, self.momentum = learning_rate, momentum

    def step(self, theta: Tensor, mean: Tensor) -> Tensor:
        if self.momentum:
            carried = self.momentum * self.state.get("velocity", torch.zeros_like(theta))
            self.state["velocity"] = carried + (mean - theta)
            mean = mean + carried
        return torch.lerp(theta, mean, self.learning_rate)  # at 1 exactly its end


class Adaptive(ServerOptimizer):
    """Reddi et al., 2021, algorithm 2, whose three rules differ in v alone; v starts at tau^2.

    m <- beta1 m + (1 - beta1) Delta, theta <- theta + learning_rate m / (sqrt(v) + tau); no bias is corrected.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        *,
        aggregation: MakeAggregation = WeightedMean,
    ) -> None:
        super().__init__(aggregation=aggregation)
        self.learning_rate, self.beta1, self.beta2, self.tau = learning_rate, beta1, beta2, tau

    @abstractmethod
    def update_v(self, v: Tensor, squares: Tensor) -> None:
        """Take Delta^2 (A,) into v (A,), in place."""

    def step(self, theta: Tensor, mean: Tensor) -> Tensor:
        if not self.state:
            self.state |= {"m": torch.zeros_like(theta), "v": torch.full_like(theta, self.tau**2)}
        m, v = self.state["m"], self.state["v"]
        delta = mean - theta
        m.mul_(self.beta1).add_(delta, alpha=1 - self.beta1)
        self.update_v(v, delta.square())
        return torch.addcdiv(theta, m, v.sqrt().add_(self.tau), value=self.learning_rate)


class FedAdagrad(Adaptive):
    """FedAdagrad: v <- v + Delta^2; its authors take beta1 = 0.

    >>> rounds = fedavg(model, clients, local=local, rounds=10, algorithm=FedAdagrad(learning_rate=1e-2))
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        beta1: float = 0.0,
        tau: float = 1e-3,
        *,
        aggregation: MakeAggregation = WeightedMean,
    ) -> None:
        super().__init__(learning_rate, beta1, tau=tau, aggregation=aggregation)

    def update_v(self, v: Tensor, squares: Tensor) -> None:
        v.add_(squares)


class FedAdam(Adaptive):
    """FedAdam: v <- beta2 v + (1 - beta2) Delta^2.

    >>> rounds = fedavg(model, clients, local=local, rounds=10, algorithm=FedAdam(learning_rate=1e-3))
    """

    def update_v(self, v: Tensor, squares: Tensor) -> None:
        v.mul_(self.beta2).add_(squares, alpha=1 - self.beta2)


class FedYogi(Adaptive):
    """FedYogi: v <- v - (1 - beta2) Delta^2 sign(v - Delta^2).

    >>> rounds = fedavg(model, clients, local=local, rounds=10, algorithm=FedYogi(learning_rate=1e-3))
    """

    def update_v(self, v: Tensor, squares: Tensor) -> None:
        v.addcmul_(squares, torch.sign(v - squares), value=self.beta2 - 1)
