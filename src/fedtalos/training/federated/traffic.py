"""Traffic: bytes that rounds send, counted from what they say of themselves.

Letters: K clients.
"""

import numpy as np

from fedtalos.training.federated.client_sampling import Sampling, sample_clients
from fedtalos.training.federated.fedavg import FedAvg, Round
from fedtalos.training.masked_parameters import MaskedParameters


class Traffic:
    """Counts the bytes of rounds: what moves, as float32, down to every client sampled and up from those that answer.

    ``first_contact`` bytes, such as a mask's bits, go down to a client the first time that it is sampled.

    >>> traffic = Traffic(moving, FedAvg(), num_clients=100)
    >>> down, up = traffic.count(round)
    """

    def __init__(
        self, moving: MaskedParameters, algorithm: FedAvg, num_clients: int, *, first_contact: int = 0
    ) -> None:
        self._wire = moving.nbytes * algorithm.vectors_sent
        self._first_contact = first_contact
        self._met = np.zeros(num_clients, dtype=np.bool_)

    def skip(self, done: int, fraction: float, seed: int, sampling: Sampling = "uniform") -> None:
        """Note whom the first ``done`` rounds met, for a run that goes on."""
        for number in range(1, done + 1):
            self._met[list(sample_clients(len(self._met), fraction, seed, number, sampling))] = True

    def count(self, round_: Round) -> tuple[int, int]:
        """Bytes down and up of one round."""
        clients = list(round_.clients)
        new = len(clients) - int(self._met[clients].sum())
        self._met[clients] = True
        silent = sum(not lost.sent for lost in round_.lost.values())
        return self._wire * len(clients) + self._first_contact * new, self._wire * (len(clients) - silent)
