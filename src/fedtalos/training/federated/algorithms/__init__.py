"""One file per paper, the client's side above the server's; FedAvg itself is beside the rounds, in fedavg.py."""

from fedtalos.training.federated.algorithms.fednova import FedNova
from fedtalos.training.federated.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedtalos.training.federated.algorithms.fedprox import FedProx
from fedtalos.training.federated.algorithms.scaffold import Scaffold
from fedtalos.training.federated.fedavg import FedAvg

ALGORITHMS: dict[str, type[FedAvg]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "scaffold": Scaffold,
    "fednova": FedNova,
}
"""Algorithms by the name that ``algorithm`` takes."""
