"""Who holds what: a few bytes per client, up to a million of them."""

import tracemalloc

import numpy as np
import pytest
import torch

from fedtalos.data.images import LabelledImages
from fedtalos.randomness import generator
from fedtalos.training.federated.client_sampling import sample_clients
from fedtalos.training.federated.clients import Clients, class_counts
from fedtalos.training.federated.partition import split_clients

MILLION = 1_000_000


def images_of(labels):
    pixels = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(len(labels), 3, 1, 1)
    return LabelledImages(pixels, torch.as_tensor(labels))


def held_by(owner, num_clients, labels=None):
    return Clients.of(images_of(np.zeros(len(owner), np.int64) if labels is None else labels), owner, num_clients)


def test_clients_are_the_ids_of_each_in_order():
    clients = held_by(np.array([2, 0, 2, 3, 0, 2]), 5)
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


def test_draws_do_not_depend_on_whose_integers_name_them():
    """A loop over np.arange(3) gives seeds that print otherwise."""
    assert generator(np.int64(0), "batches", np.int32(3)).random() == generator(0, "batches", 3).random()
    assert sample_clients(100, 0.1, np.int64(7), 2) == sample_clients(100, 0.1, 7, 2)
    with pytest.raises(TypeError):
        generator(0.0, "batches")


@pytest.mark.parametrize(("num_clients", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (70_000, "uint32")])
def test_owner_is_of_the_smallest_type(num_clients, dtype):
    owner = np.arange(2 * num_clients) % num_clients
    clients = held_by(owner, num_clients)
    assert clients.owner.dtype == dtype
    np.testing.assert_array_equal(clients.owner, owner)


def test_class_counts_equal_counting():
    labels = np.array([0, 2, 2, 0, 1, 2, 0])
    clients = held_by(np.array([0, 1, 1, 3, 0, 2, 0]), 4, labels)
    expected = [[int((labels[ids] == c).sum()) for c in range(3)] for ids in clients]
    assert class_counts(clients.owner, labels, 4, 3).tolist() == expected
    assert class_counts(clients.owner, labels, 2, 3).tolist() == expected[:2]


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity"])
def test_a_million_clients_are_split_in_a_second_and_held_in_few_bytes(scheme):
    images = images_of(np.arange(MILLION) % 2)
    tracemalloc.start()
    try:
        clients = split_clients(images, MILLION, scheme, alpha=1.0, min_client_size=1)
        sizes = clients.sizes
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= 16 * MILLION  # ids, offsets and sizes: three int32
    assert peak <= 100 * MILLION
    assert len(clients) == sizes.sum() == MILLION
    np.testing.assert_array_equal(np.bincount(clients.ids), 1)
