"""Sparse, task-localised federated fine-tuning of Vision Transformers.

import fedtalos as ft

data = ft.load_dataset("cifar100")
model = ft.load_model("tiny", data.classes, head=data.calibration)  # pretrained ViT, ridge head in closed form
mask = ft.talos_mask(model, data.calibration, density=0.1)
clients = ft.split_clients(data.train, 100, "label_skew", classes_per_client=5)
local = ft.LocalTraining(steps=4, learning_rate=1e-3)
for round in ft.fedavg(model, clients, mask, rounds=100, local=local):
    print(round.number, round.train.accuracy, ft.evaluate(model, data.val).accuracy)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedtalos._version import __version__

if TYPE_CHECKING:
    from fedtalos.data.dataset_loader import load_dataset
    from fedtalos.errors import InputError, TrainingError
    from fedtalos.metrics import Metrics
    from fedtalos.models.weights.read import load_weights
    from fedtalos.training.centralized import train_centralized
    from fedtalos.training.editing.combine import combine_masks, overlap
    from fedtalos.training.editing.controls import magnitude_mask, random_mask
    from fedtalos.training.editing.eligible import eligible_entries
    from fedtalos.training.editing.fisher import fisher_scores, scored_batches
    from fedtalos.training.editing.mask_file import load_mask, save_mask
    from fedtalos.training.editing.talos import talos_mask
    from fedtalos.training.evaluation import evaluate
    from fedtalos.training.federated.aggregation import krum, median, multi_krum, robust, trimmed_mean
    from fedtalos.training.federated.algorithms.fednova import FedNova
    from fedtalos.training.federated.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
    from fedtalos.training.federated.algorithms.fedprox import FedProx
    from fedtalos.training.federated.algorithms.scaffold import Scaffold
    from fedtalos.training.federated.fedavg import FedAvg, fedavg
    from fedtalos.training.federated.partition import split_clients
    from fedtalos.training.federated.transforms import attacked, clipped, dropouts
    from fedtalos.training.head_fitting import fit_head
    from fedtalos.training.loading import load_model
    from fedtalos.training.local_training import LocalTraining
    from fedtalos.training.masked_parameters import MaskedParameters, head_mask
    from fedtalos.training.schedule import Schedule

_NAMES = {
    "data.dataset_loader": "load_dataset",
    "errors": "InputError TrainingError",
    "metrics": "Metrics",
    "models.weights.read": "load_weights",
    "training.centralized": "train_centralized",
    "training.editing.combine": "combine_masks overlap",
    "training.editing.controls": "magnitude_mask random_mask",
    "training.editing.eligible": "eligible_entries",
    "training.editing.fisher": "fisher_scores scored_batches",
    "training.editing.mask_file": "load_mask save_mask",
    "training.editing.talos": "talos_mask",
    "training.evaluation": "evaluate",
    "training.federated.aggregation": "krum median multi_krum robust trimmed_mean",
    "training.federated.algorithms.fednova": "FedNova",
    "training.federated.algorithms.fedopt": "FedAdagrad FedAdam FedAvgM FedYogi",
    "training.federated.algorithms.fedprox": "FedProx",
    "training.federated.algorithms.scaffold": "Scaffold",
    "training.federated.fedavg": "FedAvg fedavg",
    "training.federated.partition": "split_clients",
    "training.federated.transforms": "attacked clipped dropouts",
    "training.head_fitting": "fit_head",
    "training.loading": "load_model",
    "training.local_training": "LocalTraining",
    "training.masked_parameters": "MaskedParameters head_mask",
    "training.schedule": "Schedule",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used: a part of the library needs only what that part needs."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedtalos' has no attribute {name!r}")
    return getattr(import_module(f"fedtalos.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedProx",
    "FedYogi",
    "InputError",
    "LocalTraining",
    "MaskedParameters",
    "Metrics",
    "Scaffold",
    "Schedule",
    "TrainingError",
    "__version__",
    "attacked",
    "clipped",
    "combine_masks",
    "dropouts",
    "eligible_entries",
    "evaluate",
    "fedavg",
    "fisher_scores",
    "fit_head",
    "head_mask",
    "krum",
    "load_dataset",
    "load_mask",
    "load_model",
    "load_weights",
    "magnitude_mask",
    "median",
    "multi_krum",
    "overlap",
    "random_mask",
    "robust",
    "save_mask",
    "scored_batches",
    "split_clients",
    "talos_mask",
    "train_centralized",
    "trimmed_mean",
]
