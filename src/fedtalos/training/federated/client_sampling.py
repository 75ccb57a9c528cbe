"""Sampling: which clients take part in a round.

Letters: K clients, C fraction of them in a round.
"""

from typing import Literal

import numpy as np

from fedtalos.randomness import generator

Sampling = Literal["uniform", "poisson"]
"""A round's clients: a fixed number, any of them alike; or each client by itself with probability C."""


def clients_per_round(num_clients: int, fraction: float) -> int:
    """Number of clients in a round: max(1, round(C K))."""
    return max(1, round(fraction * num_clients))


def sample_clients(
    num_clients: int, fraction: float, seed: int, round_number: int, sampling: Sampling = "uniform"
) -> tuple[int, ...]:
    """Draw a round's clients: different, ascending; a function of seed and round only.

    Sampling uniform draws max(1, round(C K)) of them. With poisson each comes with probability C, so that a round can
    be without any.

    >>> sample_clients(100, 0.05, seed=0, round_number=1)
    (5, 21, 34, 41, 53)
    """
    if sampling == "poisson":
        comes = generator(seed, "poisson clients", round_number).random(num_clients) < fraction
        return tuple(np.flatnonzero(comes).tolist())
    count = clients_per_round(num_clients, fraction)
    chosen = generator(seed, "clients", round_number).choice(num_clients, size=count, replace=False)
    return tuple(sorted(int(client) for client in chosen))
