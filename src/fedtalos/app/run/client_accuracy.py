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
from fedtalos.app.run.recorder import write_csv
from fedtalos.data.sampling import Ids
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.personal import (
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
            len(loaded.data.classes),
            classes,
            batch_size=config.data.eval_batch_size,
            precision=config.run.arithmetic,
        )
        return accuracy_by_client(clients, by_class)

    before = expected(np.unique(labels))
    rows = [
        {"client": client, "examples": int(size), "accuracy": _cell(accuracy)}
        for client, (size, accuracy) in enumerate(zip(clients.sizes, before, strict=True))
    ]
    summary: dict[str, Any] = {"client_test_accuracy": mean_and_worst(before)}
    if options.personalise_steps:
        chosen = _chosen(config, len(clients))
        console.print(f"personalising for {len(chosen)} clients", highlight=False)
        peak = settled(config.train.learning_rate)
        local = local_training(config).but(steps=options.personalise_steps, epochs=None, learning_rate=peak)
        tuned = personalised(moving, clients, chosen.tolist(), local, config.run.seed, options.personalise_alpha)
        after = np.array([expected(np.unique(labels[clients[client]]))[client] for client in tuned])
        for row in rows:
            row["personalised_accuracy"] = ""
        for client, accuracy in zip(chosen, after, strict=True):
            rows[client]["personalised_accuracy"] = _cell(accuracy)
        summary["personalised_test_accuracy"] = {
            "clients": len(chosen),
            "before": mean_and_worst(before[chosen]),
            "after": mean_and_worst(after),
        }
    if own:
        for row in rows:
            row["own_vector_accuracy"] = ""
        accuracies = []
        for client in with_own_vectors(moving, own):
            accuracies.append(expected(np.unique(labels[clients[client]]))[client])
            rows[client]["own_vector_accuracy"] = _cell(accuracies[-1])
        summary["own_vector_test_accuracy"] = mean_and_worst(np.array(accuracies))
    write_csv(paths.results / "client_accuracy.csv", rows)
    return summary


def _chosen(config: FederatedConfig, num_clients: int) -> Ids:
    """The clients to personalise for, ascending."""
    count = config.personal.personalise_clients or num_clients
    rng = generator(config.run.seed, "personal clients")
    return np.sort(rng.choice(num_clients, size=count, replace=False)).astype(np.int64)


def _cell(accuracy: float) -> str:
    return "" if math.isnan(accuracy) else f"{accuracy:.6f}"
