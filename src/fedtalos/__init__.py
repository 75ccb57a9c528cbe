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

from fedtalos._version import __version__
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
