"""Who holds what: a few bytes per client, up to a million of them."""

import tracemalloc

import numpy as np
import pytest

from fedtalos.training.federated.clients import Clients, class_counts
from fedtalos.training.federated.partition import partition

MILLION = 1_000_000


def test_clients_are_the_ids_of_each_in_order():
    clients = Clients.of(np.array([2, 0, 2, 3, 0, 2]), 5)
    held = [[1, 4], [], [0, 2, 5], [3], []]
    assert [ids.tolist() for ids in clients] == held
    assert len(clients) == 5
    assert clients[2].tolist() == clients[-3].tolist() == held[2]
    assert clients[2].dtype == np.int64  # what torch indexes with
    assert clients.sizes.tolist() == [2, 0, 3, 1, 0]
    assert clients.owner.tolist() == [2, 0, 2, 3, 0, 2]
    for beyond in (5, -6):
        with pytest.raises(IndexError):
            clients[beyond]


@pytest.mark.parametrize(("num_clients", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (70_000, "uint32")])
def test_owner_is_of_the_smallest_type(num_clients, dtype):
    owner = np.arange(2 * num_clients) % num_clients
    assert Clients.of(owner, num_clients).owner.dtype == dtype
    np.testing.assert_array_equal(Clients.of(owner, num_clients).owner, owner)


def test_class_counts_equal_counting():
    labels = np.array([0, 2, 2, 0, 1, 2, 0])
    clients = Clients.of(np.array([0, 1, 1, 3, 0, 2, 0]), 4)
    expected = [[int((labels[ids] == c).sum()) for c in range(3)] for ids in clients]
    assert class_counts(clients.owner, labels, 4, 3).tolist() == expected
    assert class_counts(clients.owner, labels, 2, 3).tolist() == expected[:2]


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity"])
def test_a_million_clients_are_split_in_a_second_and_held_in_few_bytes(scheme):
    labels = np.arange(MILLION) % 2
    tracemalloc.start()
    try:
        clients = partition(
            labels, scheme=scheme, num_clients=MILLION, seed=0, classes_per_client=1, alpha=1.0, min_size=1
        )
        sizes = clients.sizes
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= 16 * MILLION  # ids, offsets and sizes: three int32
    assert peak <= 100 * MILLION
    assert len(clients) == sizes.sum() == MILLION
    np.testing.assert_array_equal(np.bincount(clients.ids), 1)
