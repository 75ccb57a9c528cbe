"""Clients: who holds which images, in a few bytes per client and image.

Letters: N images, K clients, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Clients:
    """Images and who holds them, as two arrays: no object per client.

    ``ids`` (N,) are the images of client 0, then of client 1, and so on, ascending within each; those of client k
    are ids[offsets[k] : offsets[k + 1]], ``offsets`` (K + 1,). Both int32 where N fits, so that sizes add safely.

    >>> clients = split_clients(data.train, 100)
    >>> len(clients), clients.sizes.sum(), clients[0]
    (100, 44100, array([  214,   389, ...]))
    """

    images: LabelledImages
    ids: Integers
    offsets: Integers

    @classmethod
    def of(cls, images: LabelledImages, owner: Integers, num_clients: int) -> "Clients":
        """Build them from the client of each image, (N,)."""
        small: type[np.signedinteger[Any]] = np.int32 if len(owner) <= np.iinfo(np.int32).max else np.int64
        ids = np.argsort(owner, kind="stable").astype(small)  # stable: ids ascend within a client
        offsets = np.zeros(num_clients + 1, small)
        np.cumsum(np.bincount(owner, minlength=num_clients), out=offsets[1:])
        return cls(images, ids, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> Ids:
        """Ids of one client's images, ascending."""
        client = range(len(self))[client]  # IndexError beyond the last
        return self.ids[self.offsets[client] : self.offsets[client + 1]].astype(np.int64)

    def __iter__(self) -> Iterator[Ids]:
        return map(self.__getitem__, range(len(self)))

    def only(self, chosen: Sequence[int]) -> "Clients":
        """Give the ``chosen`` clients by themselves, numbered from 0; their ids are those of the same images."""
        parts = [self.ids[self.offsets[client] : self.offsets[client + 1]] for client in chosen]
        sizes = self.sizes[list(chosen)]  # all that a fleet's server knows of them
        offsets = np.cumsum([0, *sizes], dtype=self.offsets.dtype)
        return Clients(self.images, np.concatenate(parts), offsets)

    @property
    def sizes(self) -> Integers:
        """Number of images of each client, (K,)."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> Integers:
        """Client of each image, (N,), in the smallest unsigned type; of all images' clients only."""
        owner = np.empty(len(self.ids), np.min_scalar_type(len(self) - 1))
        owner[self.ids] = np.repeat(np.arange(len(self), dtype=owner.dtype), self.sizes)
        return owner


def class_counts(owner: Integers, labels: Integers, num_clients: int, num_classes: int) -> Ids:
    """Count each client's images of each class, for the first ``num_clients`` clients, (num_clients, C).

    ``owner`` (N,) is the client of each image, ``labels`` (N,) its class.
    """
    shown = owner < num_clients
    cells = owner[shown].astype(np.int64) * num_classes + labels[shown]
    counts: Ids = np.bincount(cells, minlength=num_clients * num_classes).reshape(num_clients, num_classes)
    return counts
