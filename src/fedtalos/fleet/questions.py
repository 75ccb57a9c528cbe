"""Questions beside training: accuracy by client, and a head from clients' sums; both sides of each.

Shapes: A entries that move, D width of the features, C classes.
"""

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtalos.app.load import Loaded
from fedtalos.errors import InputError
from fedtalos.fleet.letter import Letter, fact, vector
from fedtalos.fleet.members import Members
from fedtalos.fleet.post import NoAnswer
from fedtalos.fleet.task import Task
from fedtalos.models.heads import ClosedForm, HeadSums, best_head, head_sums, set_head
from fedtalos.training.federated.personal import accuracy_by_class, accuracy_by_client
from fedtalos.training.masked_parameters import MaskedParameters

# On the node


def evaluate(task: Task, letter: Letter) -> Letter:
    """Test the model on the node's test images, weighted by the classes that its client trains on."""
    load_theta(task, letter)
    loaded, clients = task.loaded, task.clients
    labels = clients.images.labels.cpu().numpy()
    classes = len(loaded.data.classes)
    by_class = accuracy_by_class(
        loaded.model,
        loaded.limited("test"),
        classes,
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


def load_theta(task: Task, letter: Letter) -> None:
    """Put the server's values into the model."""
    theta = vector(letter, "theta", len(task.moving))
    task.moving.write(torch.from_numpy(np.array(theta)).to(task.moving.device))


# On the server


def accuracy_of_clients(moving: MaskedParameters, members: Members) -> dict[int, float]:
    """Ask every client for the accuracy of the model as it is; those that give none are not in the answer."""
    found = {}
    for client, answer in members.ask(_letters("evaluate", {}, moving, members)):
        if isinstance(answer, Letter) and answer.kind == "accuracy":
            accuracy = fact(answer, "accuracy", float)
            if not accuracy > 1 and not accuracy < 0:  # nan where it has no test images
                found[client] = accuracy
    return found


def fit_head_from_sums(loaded: Loaded[Any], moving: MaskedParameters, members: Members, kind: ClosedForm) -> None:
    """Give the model a head from the sums of all clients' features; InputError where a client sends none.

    Sources: as ``fit_head``, whose head it is, bit for bit.
    """
    width, classes = loaded.model.head.in_features + 1, len(loaded.data.classes)
    collected = []
    for client, answer in members.ask(_letters("head", {"head": kind}, moving, members)):
        if isinstance(answer, NoAnswer) or answer.kind != "sums":
            raise InputError(f"head {kind}: client {client} sent no sums, and the head is to be of all; start it again")
        collected.append(_sums(answer, kind, width, classes))
    total = reduce(add, collected)
    set_head(
        loaded.model,
        *best_head(kind, total, *loaded.features.features(loaded.model, loaded.limited("val"))),
        source=kind,
    )
    loaded.features.keep_only(moving.frozen_stages)


def _letters(kind: str, facts: dict[str, object], moving: MaskedParameters, members: Members) -> dict[int, Letter]:
    theta = moving.vector().cpu().numpy()
    known = sorted(members.by_client.items())
    return {client: Letter(kind, {**facts, "run": member.run}, {"theta": theta}) for client, member in known}


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
