"""Central differential privacy for clients: DP-FedAvg (McMahan et al., 2018, algorithm 1) and what it guarantees.

A trusted server clips each client's update to 2-norm S, averages N of K with equal weights, and adds Gaussian noise of
deviation z S / N to every entry that moves: one that does not move gets none. Letters: z noise multiplier.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtalos.errors import InputError, install
from fedtalos.randomness import generator
from fedtalos.training.federated.aggregation import WeightedMean
from fedtalos.training.masked_parameters import MaskedParameters


class NoisyMean:
    """The mean of updates that were clipped to S before, each counting alike, with noise drawn by (seed, round)."""

    needs_finite = True

    def __init__(self, moving: MaskedParameters, clients: int, deviation: float, seed: int) -> None:
        """``deviation`` is z S, that of the sum."""
        self._mean, self._clients = WeightedMean(moving, clients), 0
        self._moving, self._deviation, self._seed = moving, deviation, seed

    def add(self, values: list[Tensor], _weight: float) -> None:
        self._mean.add(values, 1.0)
        self._clients += 1

    def write(self, number: int) -> None:
        self._mean.write(number)
        noise = generator(self._seed, "privacy noise", number).standard_normal(len(self._moving), dtype=np.float32)
        noisy = self._moving.vector()
        noisy.add_(torch.from_numpy(noise).to(noisy.device), alpha=self._deviation / self._clients)
        self._moving.write(noisy)
        self._clients = 0


def noisy_mean(noise_multiplier: float, clip: float, seed: int = 0) -> Callable[[MaskedParameters, int], NoisyMean]:
    """Aggregate by a mean with Gaussian noise of deviation z S on the sum; updates are to be ``clipped`` to S.

    >>> rounds = fedavg(
    ...     model, clients, local=local, rounds=10,
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


def epsilon(*, noise_multiplier: float, delta: float, clients: int, sampled: int, rounds: int) -> float:
    """Epsilon of (epsilon, delta)-differential privacy after ``rounds`` of ``sampled`` among ``clients``.

    Neighbours differ in all images of one client (replace-one). Replacing an update of norm at most S moves the sum
    by up to 2 S, so the accountant is told z / 2. Renyi bound of Gaussian noise under sampling without replacement
    (Wang, Balle and Kasiviswanathan, 2019, theorem 27). Raises InputError where the library is missing.
    """
    dp = accountant()
    rdp = import_module("dp_accounting.rdp")
    gaussian = dp.GaussianDpEvent(noise_multiplier / 2)
    account = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    account.compose(dp.SampledWithoutReplacementDpEvent(clients, sampled, gaussian), rounds)
    return float(account.get_epsilon(delta))
