"""Questions beside training: accuracy by client, sums for a head, weights for merging; both sides of each.

Shapes: A entries that move, D width of the features, C classes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.app.run.client_accuracy import of_everybody, write_client_accuracy
from fedtalos.app.run.holders import LocalHolders, MergeWeights, WeighedBy, weights_sent
from fedtalos.app.run.paths import RunPaths
from fedtalos.errors import InputError
from fedtalos.fleet.letter import Letter, fact, vector
from fedtalos.fleet.members import Members
from fedtalos.fleet.post import NoAnswer
from fedtalos.fleet.task import Task
from fedtalos.models.heads import ClosedForm, HeadSums, head_sums
from fedtalos.training.federated.personal import accuracy_by_class, accuracy_by_client, mean_and_worst
from fedtalos.training.head_fitting import fit_to_sums
from fedtalos.training.masked_parameters import MaskedParameters

AT_ONCE = 8
"""Clients that are asked at once where each is sent values of its own: the server holds no more of them."""

# On the node


def evaluate(task: Task, letter: Letter) -> Letter:
    """Test the model on the node's test images, weighted by the classes that its client trains on."""
    load_theta(task, letter)
    loaded, clients = task.loaded, task.clients
    labels = clients.images.labels.cpu().numpy()
    by_class = accuracy_by_class(
        loaded.model,
        loaded.limited("test"),
        np.unique(labels[clients[task.client]]),
        batch_size=loaded.config.data.eval_batch_size,
        precision=loaded.config.run.arithmetic,
    )
    return Letter("accuracy", {"accuracy": float(accuracy_by_client(clients, by_class)[task.client])})


def sums_for_head(task: Task, letter: Letter) -> Letter:
    """Sum the features of the client's images against their labels, for a head in closed form."""
    load_theta(task, letter)
    kind = fact(letter, "head", str)
    if kind not in ("ridge", "ncm"):
        raise InputError(f"head {kind!r}: expected ridge or ncm")
    loaded, clients = task.loaded, task.clients
    features = loaded.features.features(loaded.model, clients.images, clients[task.client])
    sums = head_sums(kind, *features, len(loaded.data.classes))
    arrays = {"xy": sums.xy.numpy()}
    if sums.xx is not None:
        arrays["xx"] = sums.xx.numpy()[np.triu_indices(len(sums.xx))]
    return Letter("sums", {}, arrays)


def weights_for_merging(task: Task, letter: Letter) -> Letter:
    """Sum over the client's images what a rule of merging weighs its vector by, under the client's own model."""
    load_theta(task, letter)
    moving, rule = task.moving, fact(letter, "rule", str)
    if rule not in ("fisher", "regmean"):
        raise InputError(f"rule {rule!r}: expected fisher or regmean")
    found = next(LocalHolders(task.loaded, task.clients, moving).weights(rule, [(task.client, moving.vector())]))
    masks = {name: moving.entries.masks[name] for name in weights_sent(moving, rule)}
    arrays = {name: found[name][mask] if rule == "fisher" else found[name] for name, mask in masks.items()}
    return Letter("weights", {}, {name: tensor.cpu().numpy() for name, tensor in arrays.items()})


def load_theta(task: Task, letter: Letter) -> None:
    """Put the server's values into the model."""
    theta = vector(letter, "theta", len(task.moving))
    task.moving.write(torch.from_numpy(np.array(theta)).to(task.moving.device))


# On the server


def evaluate_nodes(
    config: FederatedConfig,
    paths: RunPaths,
    moving: MaskedParameters,
    members: Members,
    own: Mapping[int, Tensor] | None = None,
) -> dict[str, Any]:
    """Write client_accuracy.csv and return what the summary says of it; nothing where nothing was asked.

    ``own`` are vectors (A,) that clients left when they trained apart: the model plus its own one is a client's, too.
    """
    if not config.personal.client_evaluation:
        return {}
    theta, there = moving.vector().cpu(), sorted(members.by_client)
    columns = {"accuracy": accuracy_of_clients(members, ((client, theta) for client in there))}
    said = {"accuracy": "client_test_accuracy"}
    if own:
        models = ((client, theta + vector) for client, vector in own.items() if client in members.by_client)
        columns["own_vector_accuracy"] = accuracy_of_clients(members, models)
        said["own_vector_accuracy"] = "own_vector_test_accuracy"
    accuracies = {column: of_everybody(found, len(members.sizes)) for column, found in columns.items()}
    write_client_accuracy(paths, members.sizes, accuracies)
    return {said[column]: mean_and_worst(values) for column, values in accuracies.items()}


def accuracy_of_clients(members: Members, models: Iterable[tuple[int, Tensor]]) -> dict[int, float]:
    """Ask clients for the accuracy of a model each, by its values (A,); those that give none are not in the answer."""
    found = {}
    for client, answer in ask_each(members, "evaluate", {}, models):
        if isinstance(answer, Letter) and answer.kind == "accuracy":
            accuracy = fact(answer, "accuracy", float)
            if not accuracy > 1 and not accuracy < 0 and not math.isnan(accuracy):  # nan: it has no test images
                found[client] = accuracy
    return found


def fit_head_from_sums(loaded: Loaded[Any], moving: MaskedParameters, members: Members, kind: ClosedForm) -> None:
    """Give the model a head from the sums of all clients' features; InputError where a client sends none.

    Sources: as ``fit_head``, whose head it is, bit for bit.
    """
    found = sums_of_clients(loaded, moving, members, kind, sorted(members.by_client))
    total = reduce(add, (sums for _, sums in found))
    fit_to_sums(loaded.model, total, loaded.limited("val"), kind, loaded.features)
    loaded.features.keep_only(moving.frozen_stages)


def sums_of_clients(
    loaded: Loaded[Any], moving: MaskedParameters, members: Members, kind: ClosedForm, clients: Sequence[int]
) -> Iterator[tuple[int, HeadSums]]:
    """Ask those of the clients that are there for sums of the features of the model as it is.

    Raises InputError where one sends none, or nobody is there.
    """
    theta, width, classes = moving.vector().cpu().numpy(), loaded.model.head.in_features + 1, len(loaded.data.classes)
    there = {client: member for client in clients if (member := members.by_client.get(client)) is not None}
    if not there:
        raise InputError(f"head {kind}: nobody is there to send sums; start the nodes, and go on with --resume")
    letters = {
        client: Letter("head", {"head": kind, "run": member.run}, {"theta": theta}) for client, member in there.items()
    }
    for client, answer in members.ask(letters):
        if isinstance(answer, NoAnswer) or answer.kind != "sums":
            raise InputError(
                f"head {kind}: client {client} sent no sums; the head is to be of all: go on with --resume"
            )
        yield client, _sums(answer, kind, width, classes)


def weights_of_clients(
    moving: MaskedParameters, members: Members, rule: WeighedBy, models: Iterable[tuple[int, Tensor]]
) -> Iterator[MergeWeights]:
    """Ask clients for what a rule of merging weighs their vectors by, each under its own model's values (A,).

    Raises InputError where one is away or sends something else.
    """
    sizes = weights_sent(moving, rule)
    for client, answer in ask_each(members, "weigh", {"rule": rule}, models):
        if isinstance(answer, NoAnswer) or answer.kind != "weights":
            raise InputError(
                f"merge {rule}: client {client} sent no weights, and all that trained are to; go on with --resume"
            )
        found = dict[str, Tensor]()
        for name, size in sizes.items():
            values = torch.from_numpy(np.array(vector(answer, name, size)))
            if not bool(values.isfinite().all()) or bool((values < 0).any()):
                raise InputError(f"merge {rule}: client {client}: expected weights that are finite and at least 0")
            found[name] = values
            if rule == "fisher":
                mask = moving.entries.masks[name].cpu()
                found[name] = torch.zeros(mask.shape).masked_scatter_(mask, values)
        yield found


def ask_each(
    members: Members, kind: str, facts: dict[str, object], models: Iterable[tuple[int, Tensor]]
) -> Iterator[tuple[int, Letter | NoAnswer]]:
    """Send clients a letter with values (A,) of their own, a few at once; yields the answers in their order."""
    models = iter(models)
    while some := list(islice(models, AT_ONCE)):
        letters = {}
        for client, values in some:
            if (member := members.by_client.get(client)) is None:
                raise InputError(f"client {client} has left, and is needed to {kind}; start its node, then --resume")
            letters[client] = Letter(kind, {**facts, "run": member.run}, {"theta": values.cpu().numpy()})
        yield from members.ask(letters)


def _sums(answer: Letter, kind: ClosedForm, width: int, classes: int) -> HeadSums:
    """Read sums, X^T Y (D+1, C) and the upper triangle of X^T X (D+1, D+1); InputError for anything else."""
    xy, xx = answer.arrays.get("xy"), answer.arrays.get("xx")
    if xy is None or xy.dtype != np.float64 or xy.shape != (width, classes) or not np.isfinite(xy).all():
        raise InputError(f"head {kind}: expected finite sums of shape ({width}, {classes})")
    if kind == "ncm":
        return HeadSums(torch.from_numpy(xy.copy()), None)
    upper = np.triu_indices(width)
    if xx is None or xx.dtype != np.float64 or xx.shape != upper[0].shape or not np.isfinite(xx).all():
        raise InputError(f"head {kind}: expected {len(upper[0])} finite sums of products")
    return HeadSums(torch.from_numpy(xy.copy()), _symmetric(xx, width))


def _symmetric(upper: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]", width: int) -> Tensor:
    full = np.zeros((width, width))
    full[np.triu_indices(width)] = upper
    return torch.from_numpy(full + np.triu(full, 1).T)
