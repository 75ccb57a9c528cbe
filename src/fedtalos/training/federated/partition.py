"""Splits of labelled images over clients: disjoint sets that cover all, one per client.

Letters: N examples, K clients, C classes present in the labels, Nc classes per client.
Every scheme says who owns each example, an (N,) vector of client numbers: so a split is disjoint and covering
by construction, and a client's ids come out ascending. One client that holds everything holds arange(N).
"""

import math
from typing import Literal

import numpy as np

from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids, largest_remainder
from fedtalos.errors import InputError, check_word
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients, Integers

Scheme = Literal["iid", "label_skew", "dirichlet", "quantity", "given"]

MAX_ALPHA = 1e6  # beyond it the shares are even to a thousandth, and far beyond it numpy's draws overflow


def split_clients(
    images: LabelledImages,
    num_clients: int,
    scheme: Scheme = "iid",
    *,
    seed: int = 0,
    classes_per_client: int = 5,
    alpha: float = 0.3,
    min_client_size: int = 10,
) -> Clients:
    """Share images among K clients: every image has one owner, and no client is without any.

    ``classes_per_client`` (Nc) counts for label_skew alone; ``alpha``, the concentration of the draw, and
    ``min_client_size`` count for dirichlet and quantity. The scheme given takes the clients that the data name
    (``given_clients``), and only the images count.

    Raises InputError where no such split exists.

    >>> clients = split_clients(data.train, 100, "label_skew", classes_per_client=5)
    """
    check_word("scheme", scheme, Scheme)
    if scheme == "given":
        return given_clients(images)
    labels = images.labels.cpu().numpy()
    if not 1 <= num_clients <= len(labels):
        raise InputError(
            f"num_clients {num_clients} with {len(labels)} training examples: every client needs an example, "
            f"choose 1 to {len(labels)}"
        )
    rng = generator(seed, "partition", scheme)
    match scheme:
        case "iid":
            owner = iid(len(labels), num_clients, rng)
        case "label_skew":
            owner = label_skew(labels, num_clients, classes_per_client, rng)
        case "dirichlet":
            _check_dirichlet(len(labels), num_clients, alpha, min_client_size)
            owner = raise_to_min_size(dirichlet(labels, num_clients, alpha, rng), num_clients, min_client_size, rng)
        case "quantity":
            _check_dirichlet(len(labels), num_clients, alpha, min_client_size)
            owner = quantity(len(labels), num_clients, alpha, rng)
            owner = raise_to_min_size(owner, num_clients, min_client_size, rng)
    return Clients.of(images, owner, num_clients)


def given_clients(images: LabelledImages) -> Clients:
    """Give each image to the client that the data name for it; clients without any are left out, so K is theirs.

    Raises InputError where the data name no clients.

    >>> clients = given_clients(load_dataset("csv", "hospitals/labels.csv").train)
    """
    if images.owners is None:
        raise InputError(
            "partition given: the data name no clients; give a CSV file with a client column, or draw a split"
        )
    present, owner = np.unique(images.owners.cpu().numpy(), return_inverse=True)
    return Clients.of(images, owner, len(present))


def iid(num_examples: int, num_clients: int, rng: np.random.Generator) -> Ids:
    """Shuffled; sizes differ by at most one."""
    owner: Ids = np.arange(num_examples) % num_clients
    return rng.permutation(owner)


def label_skew(labels: Ids, num_clients: int, classes_per_client: int, rng: np.random.Generator) -> Ids:
    """Every client holds exactly Nc classes, every class has owners, who share its examples equally.

    Where classes are equally large and K Nc is a multiple of C, clients are equally large too (within a few
    examples where a class does not divide among its owners).
    """
    classes, label = np.unique(labels, return_inverse=True)
    sizes = np.bincount(label)
    owned = _owned_classes(len(classes), num_clients, classes_per_client, int(sizes.min()), rng)
    owner = np.empty(len(labels), np.int64)
    extras = np.zeros(num_clients, np.int64)
    for c in range(len(classes)):
        owners = rng.permutation(np.flatnonzero((owned == c).any(axis=1)))
        owners = owners[np.argsort(extras[owners], kind="stable")]  # a class's remainder goes round
        examples = rng.permutation(np.flatnonzero(label == c))
        owner[examples] = owners[np.arange(len(examples)) % len(owners)]
        extras[owners[: len(examples) % len(owners)]] += 1
    return owner


def _owned_classes(
    num_classes: int, num_clients: int, classes_per_client: int, smallest_class: int, rng: np.random.Generator
) -> Integers:
    """The classes that each client owns, (K, Nc): each class comes K Nc / C times, rounded down or up.

    Each client takes the classes with the most places left, ties at random, which always comes out even
    (Havel 1955, Hakimi 1962, for a bipartite graph).
    """
    if not 1 <= classes_per_client <= num_classes:
        raise InputError(
            f"classes_per_client {classes_per_client}: the training set has {num_classes} classes, "
            f"choose 1 to {num_classes}"
        )
    places = num_clients * classes_per_client
    if places < num_classes:
        raise InputError(
            f"{num_clients} clients with {classes_per_client} classes each cannot hold all {num_classes} classes: "
            f"raise num_clients to {math.ceil(num_classes / classes_per_client)} or "
            f"classes_per_client to {math.ceil(num_classes / num_clients)}"
        )
    if math.ceil(places / num_classes) > smallest_class:
        most = num_classes * smallest_class
        raise InputError(
            f"{num_clients} clients with {classes_per_client} classes each share a class among up to "
            f"{math.ceil(places / num_classes)}, but the smallest class has {smallest_class} examples: keep "
            f"num_clients times classes_per_client at or below {most}, or choose the dirichlet split"
        )
    left = largest_remainder(np.full(num_classes, places / num_classes), places, rng)
    owned = np.empty((num_clients, classes_per_client), np.min_scalar_type(num_classes - 1))
    for client in range(num_clients):
        taken = owned[client] = np.lexsort((rng.random(num_classes), -left))[:classes_per_client]
        left[taken] -= 1
    return owned


def dirichlet(labels: Ids, num_clients: int, alpha: float, rng: np.random.Generator) -> Ids:
    """Each class is shared among the clients in proportions drawn from Dirichlet(alpha, ..., alpha).

    Sizes differ too; some clients may be empty. Source: Yurochkin et al., ICML 2019, section 4. (Hsu et al.,
    arXiv 1909.06335, draw each client's class mix instead, at equal client sizes.)
    """
    owner = np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        examples = rng.permutation(np.flatnonzero(labels == c))
        owner[examples] = _dirichlet_owners(len(examples), num_clients, alpha, rng)
    return owner


def quantity(num_examples: int, num_clients: int, alpha: float, rng: np.random.Generator) -> Ids:
    """The class mix is iid, the sizes are proportional to a draw from Dirichlet(alpha, ..., alpha)."""
    owner = np.empty(num_examples, np.int64)
    owner[rng.permutation(num_examples)] = _dirichlet_owners(num_examples, num_clients, alpha, rng)
    return owner


def _dirichlet_owners(num_examples: int, num_clients: int, alpha: float, rng: np.random.Generator) -> Ids:
    shares = num_examples * rng.dirichlet(np.full(num_clients, alpha))
    return np.repeat(np.arange(num_clients), largest_remainder(shares, num_examples, rng))


def _check_dirichlet(num_examples: int, num_clients: int, alpha: float, min_size: int) -> None:
    if not 0 < alpha <= MAX_ALPHA:
        raise InputError(f"alpha {alpha}: expected a number above 0 and at most {MAX_ALPHA:g}")
    if not 1 <= min_size <= num_examples // num_clients:
        raise InputError(
            f"min_client_size {min_size} with {num_clients} clients and {num_examples} training examples: "
            f"choose 1 to {num_examples // num_clients}, or fewer clients"
        )


def raise_to_min_size(owner: Ids, num_clients: int, min_size: int, rng: np.random.Generator) -> Ids:
    """Clients below ``min_size`` take random examples, one by one from whoever is largest by then.

    A repair, where public code redraws the split until every client is large enough: redrawing may never end,
    and biases the draw. Needs N >= K min_size.
    """
    sizes = np.bincount(owner, minlength=num_clients)
    lacking = np.maximum(min_size - sizes, 0)
    kept = _levelled(sizes, lacking.sum())
    shuffled = rng.permutation(len(owner))
    by_client = shuffled[np.argsort(owner[shuffled], kind="stable")]  # grouped, random order within a client
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    given = by_client[rank >= np.repeat(kept, sizes)]
    repaired = owner.copy()
    repaired[rng.permutation(given)] = np.repeat(np.arange(num_clients), lacking)
    return repaired


def _levelled(sizes: Ids, taken: int) -> Ids:
    """Sizes after ``taken`` examples left, one by one, from the first of the largest.

    All come down to one level, and the first few of those by one more.
    """
    at_least = np.bincount(sizes)[::-1].cumsum()  # how many hold the largest size, that or one less, ...
    level = len(at_least) - 1 - np.searchsorted(at_least.cumsum(), taken, side="right")
    levelled = np.minimum(sizes, level)
    rest = taken - (sizes - levelled).sum()
    levelled[np.flatnonzero(levelled == level)[:rest]] -= 1
    return levelled
