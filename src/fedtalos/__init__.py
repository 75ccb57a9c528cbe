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
    from fedtalos.data.class_groups import class_groups
    from fedtalos.data.dataset_loader import load_dataset
    from fedtalos.errors import InputError, TrainingError
    from fedtalos.metrics import Metrics
    from fedtalos.models.explain import attention_rollout, grad_cam
    from fedtalos.models.export.folder import export_model
    from fedtalos.models.weights.read import load_weights
    from fedtalos.training.centralized import train_centralized
    from fedtalos.training.confusion import confusion
    from fedtalos.training.editing.alpha_search import best_alpha
    from fedtalos.training.editing.combine import combine_masks, overlap
    from fedtalos.training.editing.controls import magnitude_mask, random_mask
    from fedtalos.training.editing.disentanglement import disentanglement_error
    from fedtalos.training.editing.eligible import eligible_entries
    from fedtalos.training.editing.fisher import fisher_scores, scored_batches
    from fedtalos.training.editing.forgetting import forget
    from fedtalos.training.editing.mask_file import load_mask, save_mask
    from fedtalos.training.editing.merging import merge
    from fedtalos.training.editing.merging_by_data import input_moments
    from fedtalos.training.editing.talos import talos_mask
    from fedtalos.training.editing.task_vectors import TaskVector, apply, task_vector
    from fedtalos.training.editing.vector_file import load_vector, save_vector
    from fedtalos.training.evaluation import evaluate
    from fedtalos.training.federated.aggregation import krum, median, multi_krum, robust, trimmed_mean
    from fedtalos.training.federated.algorithms.fednova import FedNova
    from fedtalos.training.federated.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
    from fedtalos.training.federated.algorithms.fedprox import FedProx
    from fedtalos.training.federated.algorithms.scaffold import Scaffold
    from fedtalos.training.federated.apart import train_apart
    from fedtalos.training.federated.fedavg import FedAvg, fedavg
    from fedtalos.training.federated.one_shot import one_shot
    from fedtalos.training.federated.partition import split_clients
    from fedtalos.training.federated.tasks import split_by_task
    from fedtalos.training.federated.transforms import attacked, clipped, dropouts
    from fedtalos.training.head_fitting import fit_head
    from fedtalos.training.loading import load_model, load_trained
    from fedtalos.training.local_training import LocalTraining
    from fedtalos.training.masked_parameters import MaskedParameters, head_mask
    from fedtalos.training.prediction import predict
    from fedtalos.training.schedule import Schedule
    from fedtalos.training.task_accuracy import task_accuracy

_NAMES = {
    "data.class_groups": "class_groups",
    "data.dataset_loader": "load_dataset",
    "errors": "InputError TrainingError",
    "metrics": "Metrics",
    "models.explain": "attention_rollout grad_cam",
    "models.export.folder": "export_model",
    "models.weights.read": "load_weights",
    "training.centralized": "train_centralized",
    "training.editing.alpha_search": "best_alpha",
    "training.confusion": "confusion",
    "training.editing.combine": "combine_masks overlap",
    "training.editing.controls": "magnitude_mask random_mask",
    "training.editing.disentanglement": "disentanglement_error",
    "training.editing.eligible": "eligible_entries",
    "training.editing.fisher": "fisher_scores scored_batches",
    "training.editing.forgetting": "forget",
    "training.editing.mask_file": "load_mask save_mask",
    "training.editing.merging": "merge",
    "training.editing.merging_by_data": "input_moments",
    "training.editing.talos": "talos_mask",
    "training.editing.task_vectors": "TaskVector apply task_vector",
    "training.editing.vector_file": "load_vector save_vector",
    "training.evaluation": "evaluate",
    "training.federated.aggregation": "krum median multi_krum robust trimmed_mean",
    "training.federated.algorithms.fednova": "FedNova",
    "training.federated.algorithms.fedopt": "FedAdagrad FedAdam FedAvgM FedYogi",
    "training.federated.algorithms.fedprox": "FedProx",
    "training.federated.algorithms.scaffold": "Scaffold",
    "training.federated.apart": "train_apart",
    "training.federated.fedavg": "FedAvg fedavg",
    "training.federated.one_shot": "one_shot",
    "training.federated.partition": "split_clients",
    "training.federated.tasks": "split_by_task",
    "training.federated.transforms": "attacked clipped dropouts",
    "training.head_fitting": "fit_head",
    "training.loading": "load_model load_trained",
    "training.local_training": "LocalTraining",
    "training.masked_parameters": "MaskedParameters head_mask",
    "training.prediction": "predict",
    "training.schedule": "Schedule",
    "training.task_accuracy": "task_accuracy",
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
    "TaskVector",
    "TrainingError",
    "__version__",
    "apply",
    "attacked",
    "attention_rollout",
    "best_alpha",
    "class_groups",
    "clipped",
    "combine_masks",
    "confusion",
    "disentanglement_error",
    "dropouts",
    "eligible_entries",
    "evaluate",
    "export_model",
    "fedavg",
    "fisher_scores",
    "fit_head",
    "forget",
    "grad_cam",
    "head_mask",
    "input_moments",
    "krum",
    "load_dataset",
    "load_mask",
    "load_model",
    "load_trained",
    "load_vector",
    "load_weights",
    "magnitude_mask",
    "median",
    "merge",
    "multi_krum",
    "one_shot",
    "overlap",
    "predict",
    "random_mask",
    "robust",
    "save_mask",
    "save_vector",
    "scored_batches",
    "split_by_task",
    "split_clients",
    "talos_mask",
    "task_accuracy",
    "task_vector",
    "train_apart",
    "train_centralized",
    "trimmed_mean",
]
