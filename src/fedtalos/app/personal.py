"""How each client fares with the final model, and with one fine-tuned for it: accuracy on test images like its own.

A client has no test images of its own: the test split is weighted with the classes that the client trains on.
Shapes: K clients, N training images, C classes.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.optim import Optimizer

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.run.folders import RunPaths
from fedtalos.app.run.recorder import write_csv
from fedtalos.app.setup import Setup
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients
from fedtalos.training.masked_parameters import Entries, Values, named_tensors

Accuracies = NDArray[np.float64]


def evaluate_clients(
    config: FederatedConfig,
    paths: RunPaths,
    setup: Setup,
    clients: Clients,
    entries: Entries,
    optimizer: Optimizer,
    console: Console,
) -> dict[str, Any]:
    """Write client_accuracy.csv and return what the summary says of it; nothing where nothing was asked.

    The model is left as it was.
    """
    options = config.personal
    if not options.client_evaluation and options.personalise_steps == 0:
        return {}
    labels = setup.dataset.train.labels.cpu().numpy()
    before = accuracy_by_client(clients, labels, accuracy_by_class(setup, np.unique(labels)))
    rows = [
        {"client": client, "examples": int(size), "accuracy": _cell(accuracy)}
        for client, (size, accuracy) in enumerate(zip(clients.sizes, before, strict=True))
    ]
    summary: dict[str, Any] = {"client_test_accuracy": mean_and_worst(before)}
    if options.personalise_steps:
        chosen = _chosen(config, len(clients))
        console.print(f"personalising for {len(chosen)} clients", highlight=False)
        after = np.array(list(_personalised(config, setup, clients, entries, optimizer, chosen)))
        for row in rows:
            row["personalised_accuracy"] = ""
        for client, accuracy in zip(chosen, after, strict=True):
            rows[client]["personalised_accuracy"] = _cell(accuracy)
        summary["personalised_test_accuracy"] = {
            "clients": len(chosen),
            "before": mean_and_worst(before[chosen]),
            "after": mean_and_worst(after),
        }
    write_csv(paths.results / "client_accuracy.csv", rows)
    return summary


def accuracy_by_class(setup: Setup, classes: NDArray[np.int64]) -> Accuracies:
    """Test accuracy (C,) of the resident model in these classes; nan in others, and where there is no test image."""
    correct, images = setup.answers_by_class("test", classes).numpy()
    return _ratio(correct, images)


def accuracy_by_client(clients: Clients, labels: NDArray[np.int64], by_class: Accuracies) -> Accuracies:
    """What each client can expect, (K,): the mean over its images of their classes' accuracy (C,).

    ``labels`` (N,) are the training images' classes. A class whose accuracy is nan does not count; nan for a client
    without another.
    """
    expected = by_class[labels]
    known = ~np.isnan(expected)
    owner = clients.owner[known]
    sums = np.bincount(owner, weights=expected[known], minlength=len(clients))
    return _ratio(sums, np.bincount(owner, minlength=len(clients)))


def mean_and_worst(accuracies: Accuracies) -> dict[str, float]:
    """The mean over clients, and over the tenth of them (at least one) that fares worst; clients of nan left out."""
    known = np.sort(accuracies[~np.isnan(accuracies)])
    if len(known) == 0:
        return {"mean": math.nan, "worst_10_percent": math.nan}
    worst = known[: math.ceil(len(known) / 10)]
    return {"mean": round(float(known.mean()), 6), "worst_10_percent": round(float(worst.mean()), 6)}


def _personalised(
    config: FederatedConfig,
    setup: Setup,
    clients: Clients,
    entries: Entries,
    optimizer: Optimizer,
    chosen: NDArray[np.int64],
) -> Iterator[float]:
    """Accuracy after fine-tuning the model on that client's images alone, at the peak learning rate, for each."""
    rate, seed = config.train.learning_rate, config.run.seed
    assert rate is not None
    labels = setup.dataset.train.labels.cpu().numpy()
    resident = entries.moving_rows(named_tensors(setup.model))
    theta = Values(resident)
    try:
        for client in map(int, chosen):
            torch._foreach_copy_(resident, theta.parts)
            optimizer.state.clear()
            setup.train_on(
                clients[client],
                config.personal.personalise_steps,
                optimizer,
                entries,
                config.train,
                rng=generator(seed, "personal batches", client),
                learning_rate=lambda _: rate,
                where=f"personalising for client {client}",
            )
            own = np.unique(labels[clients[client]])
            yield float(accuracy_by_client(clients, labels, accuracy_by_class(setup, own))[client])
    finally:
        torch._foreach_copy_(resident, theta.parts)


def _chosen(config: FederatedConfig, num_clients: int) -> NDArray[np.int64]:
    """The clients to personalise for, ascending."""
    count = config.personal.personalise_clients or num_clients
    rng = generator(config.run.seed, "personal clients")
    return np.sort(rng.choice(num_clients, size=count, replace=False)).astype(np.int64)


def _ratio(sums: NDArray[Any], counts: NDArray[np.int64]) -> Accuracies:
    """sums / counts, nan where there is nothing to count."""
    out = np.full(len(sums), np.nan)
    np.divide(sums, counts, out=out, where=counts > 0)
    return out


def _cell(accuracy: float) -> str:
    return "" if math.isnan(accuracy) else f"{accuracy:.6f}"
