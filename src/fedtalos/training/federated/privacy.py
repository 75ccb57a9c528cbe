"""Central differential privacy for clients: DP-FedAvg (McMahan et al., 2018, algorithm 1) and what it guarantees.

A trusted server clips each client's update to 2-norm S, adds up a round's, divides by N, and adds Gaussian noise of
deviation z S / N to every entry that moves: one that does not move gets none. N is the number of clients in a round,
or the number expected where each comes by chance. Letters: z noise multiplier, K clients.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedtalos.errors import InputError, install
from fedtalos.randomness import generator
from fedtalos.training.federated.aggregation import WeightedMean
from fedtalos.training.federated.client_sampling import Sampling
from fedtalos.training.masked_parameters import MaskedParameters

Adjacency = Literal["replace one client", "add or remove one client"]
"""Federations that are to be hard to tell apart differ by this."""


class NoisyMean:
    """The mean of updates that were clipped to S before, each counting alike, with noise drawn by (seed, round).

    The sum is divided by the number of clients expected, whoever came: a client that is lost counts as no change, and
    a round without clients leaves noise alone.
    """

    needs_finite = True
    writes_alone = True

    def __init__(self, moving: MaskedParameters, clients: float, deviation: float, seed: int) -> None:
        """``clients`` is N, ``deviation`` z S, that of the sum."""
        self._mean, self._expected, self._came = WeightedMean(moving, clients), clients, 0
        self._moving, self._deviation, self._seed = moving, deviation, seed

    def add(self, values: list[Tensor], _weight: float) -> None:
        self._mean.add(values, 1.0)
        self._came += 1

    def write(self, number: int) -> None:
        noise = generator(self._seed, "privacy noise", number).standard_normal(len(self._moving), dtype=np.float32)
        noisy = self._moving.vector()  # theta
        if self._came:
            theta = noisy
            self._mean.write(number)
            noisy = self._moving.vector()
            if self._came != self._expected:
                noisy = torch.lerp(theta, noisy, self._came / self._expected)
        noisy.add_(torch.from_numpy(noise).to(noisy.device), alpha=self._deviation / self._expected)
        self._moving.write(noisy)
        self._came = 0


def noisy_mean(noise_multiplier: float, clip: float, seed: int = 0) -> Callable[[MaskedParameters, float], NoisyMean]:
    """Aggregate by a mean with Gaussian noise of deviation z S on the sum; updates are to be ``clipped`` to S.

    >>> rounds = fedavg(
    ...     model, clients, local=local, rounds=10, sampling="poisson",
    ...     algorithm=FedAvg(aggregation=noisy_mean(1.0, clip=0.5)), through=[clipped(0.5)],
    ... )
    """
    return lambda moving, clients: NoisyMean(moving, clients, noise_multiplier * clip, seed)


def accountant() -> Any:
    """The library that keeps the account; InputError where it is not installed."""
    try:
        return import_module("dp_accounting")
    except ImportError as error:
        raise InputError(f"dp-accounting cannot be imported ({error}); {install('privacy')}") from error


def epsilon(
    *,
    noise_multiplier: float,
    delta: float,
    clients: int,
    sampled: float,
    rounds: int,
    sampling: Sampling = "uniform",
    adjacency: Adjacency | None = None,
) -> float:
    """Epsilon of (epsilon, delta)-differential privacy after ``rounds`` of ``sampled`` among ``clients``.

    Sampling uniform draws exactly ``sampled`` clients without replacement, and neighbours differ in all images of one
    client (replace one client). Replacing an update of norm at most S moves the sum by up to 2 S, so the accountant is
    told z / 2. Renyi bound of Gaussian noise (Wang, Balle and Kasiviswanathan, 2019, theorem 27).

    Sampling poisson lets each client come with probability ``sampled / clients``. Neighbours differ by a client that is
    there or not (add or remove one client), which moves the sum by S. Renyi bound (Mironov, Talwar and Zhang, 2019,
    arXiv 1908.10530). For ``adjacency`` replace one client, the stronger promise, a sampled client's update may become
    its opposite. That bound is a tighter one, by the distribution of the privacy loss: it takes seconds, for hardly any
    noise minutes.

    Raises InputError where the library is missing, or has no account of the two together.

    >>> epsilon(noise_multiplier=2, delta=1e-5, clients=100, sampled=20, rounds=5)
    5.7302
    >>> epsilon(noise_multiplier=2, delta=1e-5, clients=100, sampled=20, rounds=5, sampling="poisson")
    1.4058
    """
    dp = accountant()
    replaced = adjacency == "replace one client" or (adjacency is None and sampling == "uniform")
    relation = dp.NeighboringRelation.REPLACE_ONE if replaced else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if sampling == "uniform":
        if not replaced:
            raise InputError(
                "adjacency add or remove one client: needs sampling poisson; a fixed number has no account"
            )
        gaussian = dp.GaussianDpEvent(noise_multiplier / 2)
        event = dp.SampledWithoutReplacementDpEvent(clients, sampled, gaussian)
    else:
        event = dp.PoissonSampledDpEvent(sampled / clients, dp.GaussianDpEvent(noise_multiplier))
    by_loss = replaced and sampling == "poisson"
    kind = (
        import_module("dp_accounting.pld").PLDAccountant
        if by_loss
        else import_module("dp_accounting.rdp").RdpAccountant
    )
    account = kind(neighboring_relation=relation)
    with _quiet():
        account.compose(event, rounds)
        return float(account.get_epsilon(delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide that the library leaves out orders of the Renyi bound for which its series converges slowly."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
