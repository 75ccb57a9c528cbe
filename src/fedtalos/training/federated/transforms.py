"""Transforms of updates between a client's training and the server: clipping, attacks, drop-outs, stragglers.

Each takes updates and gives updates, and they compose as a list. An update is theta_k - theta; what does not move is
equal in both, so it stays, and adds nothing to a norm.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedtalos.errors import check_word
from fedtalos.randomness import generator
from fedtalos.training.entries import Values
from fedtalos.training.federated.fedavg import Lost, Transform, Update, Updates

Attack = Literal["sign_flip", "scaled", "nan"]
FACTORS: dict[Attack, float] = {"sign_flip": -1.0, "scaled": -100.0, "nan": float("nan")}


def clipped(max_norm: float) -> Transform:
    """Scale every update down to 2-norm ``max_norm`` where it is longer; a shorter one keeps its bits.

    u <- u min(1, S / |u|) (McMahan et al., 2018, algorithm 1, flat clipping).

    >>> rounds = fedavg(model, clients, local=local, rounds=10, through=[clipped(1.0)])
    """

    def factor(_client: int, update: list[Tensor]) -> float:
        norm = float(torch.stack(torch._foreach_norm(update)).cpu().double().norm())
        return max_norm / norm if norm > max_norm else 1.0

    return _scaled(factor)


def attacked(attack: Attack, attackers: Collection[int]) -> Transform:
    """Let ``attackers`` send their update times -1 (sign_flip), -100 (scaled) or NaN, whenever they are drawn.

    >>> through = [attacked("sign_flip", attackers={0, 3}), clipped(1.0)]
    """
    check_word("attack", attack, Attack)
    return _scaled(lambda client, _update: FACTORS[attack] if client in attackers else 1.0)


def draw_attackers(num_clients: int, count: int, seed: int) -> frozenset[int]:
    """Draw who attacks, out of all clients."""
    return frozenset(generator(seed, "attackers").choice(num_clients, count, replace=False).tolist())


def dropouts(rate: float, seed: int) -> Transform:
    """Let each sampled client send nothing with chance ``rate``, drawn by (seed, round, client).

    >>> rounds = fedavg(model, clients, local=local, rounds=10, through=[dropouts(0.2, seed=0)])
    """
    return _absent(
        lambda number, client: "dropped out" if generator(seed, "dropouts", number, client).random() < rate else None
    )


def stragglers(deadline: float, slowest: float, seed: int, steps_of: Callable[[int], int]) -> Transform:
    """Lose clients that are late: a round waits as long as the fastest client takes for ``deadline`` steps.

    A client's step takes 1 to ``slowest`` times the fastest's, log-uniform, the same in every round; ``steps_of`` is
    a client's number of steps.
    """

    def late(_number: int, client: int) -> str | None:
        slowness = float(slowest ** generator(seed, "slowness", client).random())
        return "late" if steps_of(client) * slowness > deadline else None

    return _absent(late)


def _absent(why: Callable[[int, int], str | None]) -> Transform:
    """Clients for whom ``why`` (round, client) gives a reason get theta and send nothing."""

    def transform(updates: Updates) -> Updates:
        def of_those_present(number: int, clients: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
            missing = {client: reason for client in clients if (reason := why(number, client)) is not None}
            answers = iter(updates(number, [client for client in clients if client not in missing], theta))
            for client in clients:
                yield (client, Lost(missing[client])) if client in missing else next(answers)

        return of_those_present

    return transform


def _scaled(factor: Callable[[int, list[Tensor]], float]) -> Transform:
    def scale(client: int, values: list[Tensor], theta: Values) -> None:
        update = list(torch._foreach_sub(values, theta.parts))
        if (by := factor(client, update)) != 1:
            torch._foreach_mul_(update, by)
            torch._foreach_copy_(values, torch._foreach_add(theta.parts, update))

    def transform(updates: Updates) -> Updates:
        def scaled(number: int, clients: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
            for client, update in updates(number, clients, theta):
                if isinstance(update, Update):
                    scale(client, update.values, theta)
                yield client, update

        return scaled

    return transform
