"""A node's task: data, model and training of one run, from what the server says and what the node itself allows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtalos.app.config.files import override
from fedtalos.app.config.fleet import FleetNodeConfig
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.federation import algorithm_of, clients_of, local_training
from fedtalos.app.load import Loaded, load
from fedtalos.app.run.holders import LocalHolders
from fedtalos.checkpoint import save_checkpoint
from fedtalos.data.class_names import check_same_classes
from fedtalos.errors import InputError
from fedtalos.fleet.frozen import read_frozen_part
from fedtalos.fleet.letter import Letter, fact
from fedtalos.training.entries import named_tensors
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

OF_THE_SERVER = {"run_name", "output_dir", "config", "preset", "resume", "resume_or_start", "tracker", "mask", "head"}
"""Options of a run that say nothing to a node."""


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that a node needs to train its client in a run's rounds."""

    loaded: Loaded[FederatedConfig]
    clients: Clients
    moving: MaskedParameters
    local: LocalTraining
    algorithm: FedAvg
    client: int

    @property
    def images(self) -> int:
        """Number of the client's training images."""
        return int(self.clients.sizes[self.client])

    @property
    def classes(self) -> dict[str, list[int]]:
        """A fact about the client's classes, where the server writes them beside its vector; else none."""
        if not self.loaded.config.apart.one_shot:
            return {}
        return {"classes": list(LocalHolders(self.loaded, self.clients, self.moving).classes(self.client))}


def begin_task(letter: Letter, still: bytes, node: FleetNodeConfig, state: Path) -> Task:
    """Make the task that a "begin" letter asks for, from the model's frozen part and the node's own images.

    Raises InputError where the node does not admit it, or its images are not what the run is about.
    """
    options = {name: value for name, value in fact(letter, "options", dict).items() if name not in OF_THE_SERVER}
    if options.get("dataset") != node.dataset:
        raise InputError(f"this node admits the data set {node.dataset}, not {options.get('dataset')!r}")
    tensors, mask = read_frozen_part(still, fact(letter, "shapes", dict))
    name = fact(letter, "still", str)
    about = {**fact(letter, "model", dict), "classes": fact(letter, "classes", list)}
    checkpoint = save_checkpoint(state / "models" / name, "still", 0, tensors, about)
    config = override(
        FederatedConfig(), options | own_options(node, state) | {"weights": str(checkpoint)}, "the server"
    )
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    loaded = load(config)
    check_same_classes(about["classes"], loaded.data.classes, "the server")
    if node.holds == "part" and loaded.data.fingerprint != fact(letter, "data", str):
        raise InputError("a part of the data set is asked for, and this node's data set is another than the server's")
    for name, tensor in named_tensors(loaded.model).items():
        tensor.copy_(tensors[name])
    moving = MaskedParameters(loaded.model, mask, features=loaded.features)
    clients = clients_held(loaded, node)
    return Task(loaded, clients, moving, local_training(loaded.config), algorithm_of(loaded.config), node.client)


def own_options(node: FleetNodeConfig, state: Path) -> dict[str, Any]:
    """Options that are the node's alone to say: where it reads, writes and computes."""
    return {
        "data_dir": str(node.data_dir),
        "output_dir": str(state),
        "cache_dir": None,
        "device": node.device,
        "threads": node.threads,
        "workers": 1,
        "clients_at_once": 1,
        "head": "random",  # it comes with the frozen part, or with theta
    }


def clients_held(loaded: Loaded[FederatedConfig], node: FleetNodeConfig) -> Clients:
    """Say who holds the node's images: its own client all of them, or each its part."""
    images, split = loaded.data.train, loaded.config.split
    if node.client >= split.num_clients:
        raise InputError(f"this node is client {node.client}; the run has clients 0 to {split.num_clients - 1}")
    if node.holds == "part":
        return clients_of(images, split, loaded.config.run.seed)
    return Clients.of(images, np.full(len(images), node.client), split.num_clients)
