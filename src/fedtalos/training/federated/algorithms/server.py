"""What the server makes of the clients' weighted mean, where that is more than FedAvg's "take it".

Delta = mean - theta is the pseudo-gradient, with the sign of a step. Rules hold nothing but ``state``, a dict of
tensors that the caller gives them: put back what was in it, and they go on to the bit. Shapes: K clients, A entries
that move; frozen entries are never seen here.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ServerRule = Callable[[Sequence[int], Tensor, Tensor], Tensor]
"""(clients of the round, theta (A,), their weighted mean (A,)) -> the new theta (A,)."""

Adaptive = Literal["fedadagrad", "fedadam", "fedyogi"]
State = dict[str, Tensor]


class ServerSGD:
    """FedAvgM (Hsu, Qi and Brown, 2019): v <- momentum v + Delta, theta <- theta + learning_rate v.

    Learning rate 1 and momentum 0 give the mean itself, to the bit: FedAvg.
    """

    def __init__(self, state: State, *, learning_rate: float, momentum: float) -> None:
        self._state, self._learning_rate, self._momentum = state, learning_rate, momentum

    def __call__(self, _clients: Sequence[int], theta: Tensor, mean: Tensor) -> Tensor:
        if self._momentum:
            carried = self._momentum * self._state.get("velocity", torch.zeros_like(theta))
            self._state["velocity"] = carried + (mean - theta)
            mean = mean + carried
        return torch.lerp(theta, mean, self._learning_rate)  # at 1 exactly its end


class ServerAdaptive:
    """FedAdagrad, FedAdam and FedYogi (Reddi et al., 2021, algorithm 2), which differ in v alone; v starts at tau^2.

    m <- beta1 m + (1 - beta1) Delta, theta <- theta + learning_rate m / (sqrt(v) + tau); no bias is corrected.
    """

    def __init__(
        self, rule: Adaptive, state: State, *, learning_rate: float, beta1: float, beta2: float, tau: float
    ) -> None:
        self._rule, self._state = rule, state
        self._learning_rate, self._beta1, self._beta2, self._tau = learning_rate, beta1, beta2, tau

    def __call__(self, _clients: Sequence[int], theta: Tensor, mean: Tensor) -> Tensor:
        if not self._state:
            self._state |= {"m": torch.zeros_like(theta), "v": torch.full_like(theta, self._tau**2)}
        m, v = self._state["m"], self._state["v"]
        delta = mean - theta
        squares = delta.square()
        m.mul_(self._beta1).add_(delta, alpha=1 - self._beta1)
        match self._rule:
            case "fedadagrad":
                v.add_(squares)
            case "fedadam":
                v.mul_(self._beta2).add_(squares, alpha=1 - self._beta2)
            case "fedyogi":
                v.addcmul_(squares, torch.sign(v - squares), value=self._beta2 - 1)
        return torch.addcdiv(theta, m, v.sqrt().add_(self._tau), value=self._learning_rate)


class NormalisedAveraging:
    """FedNova (Wang et al., 2020, equation 7): clients count by direction, not by how many steps they took.

    theta <- theta + (sum p_k a_k) sum p_k (theta_k - theta) / a_k, with p_k the client's share of the round's images
    and a_k its ``progress``. The mean that it is given is to be weighted by ``weights``; with equal a_k all is
    FedAvg, to the bit.
    """

    def __init__(self, sizes: NDArray[np.integer], progress: NDArray[np.float64]) -> None:
        """Both (K,): images, and a_k of ``local_progress``."""
        self._sizes, self._progress = sizes, progress / progress[0]  # only ratios count; equal ones become exactly 1
        self.weights = self._sizes / self._progress

    def __call__(self, clients: Sequence[int], theta: Tensor, mean: Tensor) -> Tensor:
        sizes, progress = self._sizes[list(clients)], self._progress[list(clients)]
        factor = float((sizes * progress).sum() * (sizes / progress).sum() / sizes.sum(dtype=np.float64) ** 2)
        return torch.lerp(theta, mean, factor)


def local_progress(steps: int, momentum: float) -> float:
    """FedNova's a_k: how far ``steps`` steps of SGD go where every gradient, and the learning rate, is 1.

    The number of steps without momentum; (Wang et al., 2020, section 4.1) with it.
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
