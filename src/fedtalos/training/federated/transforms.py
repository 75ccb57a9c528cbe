"""What may happen to a client's update between its training and the server's sum: clipping, and attacks to try.

An update is theta_k - theta. What does not move is equal in both, so it stays, and adds nothing to a norm.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedtalos.training.federated.fedavg import Outcome, TrainClients
from fedtalos.training.loop import BadUpdateError
from fedtalos.training.masked_parameters import Values

Attack = Literal["sign_flip", "scaled", "nan"]
FACTORS: dict[Attack, float] = {"sign_flip": -1.0, "scaled": -100.0, "nan": float("nan")}


def clipped(train_clients: TrainClients, max_norm: float) -> TrainClients:
    """Scale every update down to 2-norm ``max_norm`` where it is longer; a shorter one keeps its bits.

    u <- u min(1, S / |u|) (McMahan et al., 2018, algorithm 1, flat clipping).
    """

    def factor(update: list[Tensor]) -> float:
        norm = float(torch.stack(torch._foreach_norm(update)).cpu().double().norm())
        return max_norm / norm if norm > max_norm else 1.0

    return _scaled(train_clients, lambda _client, update: factor(update))


def attacked(train_clients: TrainClients, attack: Attack, attackers: Collection[int]) -> TrainClients:
    """Those clients send their update times a factor, in every round that they are drawn for: -1, -100 or NaN."""
    return _scaled(train_clients, lambda client, _update: FACTORS[attack] if client in attackers else 1.0)


def _scaled(train_clients: TrainClients, factor: Callable[[int, list[Tensor]], float]) -> TrainClients:
    def scale(client: int, values: list[Tensor], theta: Values) -> None:
        update = list(torch._foreach_sub(values, theta.parts))
        if (by := factor(client, update)) != 1:
            torch._foreach_mul_(update, by)
            torch._foreach_copy_(values, torch._foreach_add(theta.parts, update))

    def train_scaled(number: int, clients: Sequence[int], theta: Values) -> Iterator[Outcome]:
        for client, outcome in zip(clients, train_clients(number, clients, theta), strict=True):
            if not isinstance(outcome, BadUpdateError):
                scale(client, outcome[1], theta)
            yield outcome

    return train_scaled
