"""Accuracy by client at the end of a federated run: client_accuracy.csv, and what the summary says of it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.federation import local_training, settled
from fedtalos.app.load import Loaded
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import cell, write_csv
from fedtalos.data.sampling import Ids
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients, Integers
from fedtalos.training.federated.personal import (
    Accuracies,
    accuracy_by_class,
    accuracy_by_client,
    mean_and_worst,
    personalised,
    with_own_vectors,
)
from fedtalos.training.masked_parameters import MaskedParameters


def evaluate_clients(
    loaded: Loaded[FederatedConfig],
    paths: RunPaths,
    clients: Clients,
    moving: MaskedParameters,
    console: Console,
    own: Mapping[int, Tensor] | None = None,
) -> dict[str, Any]:
    """Write client_accuracy.csv and return what the summary says of it; nothing where nothing was asked.

    ``own`` are vectors (A,) that clients left when they trained apart: the model plus its own one is a client's, too.
    The model is left as it was.
    """
    config = loaded.config
    options = config.personal
    if not options.client_evaluation and options.personalise_steps == 0:
        return {}
    labels = clients.images.labels.cpu().numpy()

    def expected(classes: NDArray[np.int64]) -> NDArray[np.float64]:
        by_class = accuracy_by_class(
            loaded.model,
            loaded.limited("test"),
            classes,
            batch_size=config.data.eval_batch_size,
            precision=config.run.arithmetic,
        )
        return accuracy_by_client(clients, by_class)

    def of_own_classes(client: int) -> float:
        return float(expected(np.unique(labels[clients[client]]))[client])

    before = expected(np.unique(labels))
    columns = {"accuracy": before}
    summary: dict[str, Any] = {"client_test_accuracy": mean_and_worst(before)}
    if options.personalise_steps:
        chosen = _chosen(config, len(clients))
        console.print(f"personalising for {len(chosen)} clients", highlight=False)
        peak = settled(config.train.learning_rate)
        local = local_training(config).but(steps=options.personalise_steps, epochs=None, learning_rate=peak)
        tuned = personalised(moving, clients, chosen.tolist(), local, config.run.seed, options.personalise_alpha)
        after = {client: of_own_classes(client) for client in tuned}
        columns["personalised_accuracy"] = of_everybody(after, len(clients))
        summary["personalised_test_accuracy"] = {
            "clients": len(chosen),
            "before": mean_and_worst(before[chosen]),
            "after": mean_and_worst(columns["personalised_accuracy"]),
        }
    if own:
        found = {client: of_own_classes(client) for client in with_own_vectors(moving, own)}
        columns["own_vector_accuracy"] = of_everybody(found, len(clients))
        summary["own_vector_test_accuracy"] = mean_and_worst(columns["own_vector_accuracy"])
    write_client_accuracy(paths, clients.sizes, columns)
    return summary


def of_everybody(found: Mapping[int, float], count: int) -> Accuracies:
    """Accuracies of all ``count`` clients, (K,), nan for those that are not in ``found``."""
    return np.array([found.get(client, math.nan) for client in range(count)])


def write_client_accuracy(paths: RunPaths, sizes: Integers, columns: Mapping[str, Accuracies]) -> None:
    """Write client_accuracy.csv: a row for each client with its number of images, and columns (K,) of accuracies."""
    rows = [
        {"client": client, "examples": int(size), **{name: cell(values[client]) for name, values in columns.items()}}
        for client, size in enumerate(sizes)
    ]
    write_csv(paths.results / "client_accuracy.csv", rows)


def _chosen(config: FederatedConfig, num_clients: int) -> Ids:
    """The clients to personalise for, ascending."""
    count = config.personal.personalise_clients or num_clients
    rng = generator(config.run.seed, "personal clients")
    return np.sort(rng.choice(num_clients, size=count, replace=False)).astype(np.int64)
