"""Splits among clients: disjoint, covering, seeded, and what each scheme promises."""

import hashlib
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import largest_remainder, stratified_sample
from fedtalos.errors import InputError
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import class_counts
from fedtalos.training.federated.partition import raise_to_min_size, split_clients

SCHEMES = ("iid", "label_skew", "dirichlet", "quantity")
few_examples = settings(max_examples=60, deadline=None)
class_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def labels_of(sizes, seed=0):
    return generator(seed, "labels").permutation(np.repeat(np.arange(len(sizes)), sizes))


def split(labels, scheme, num_clients, *, seed=0, classes_per_client=1, alpha=0.3, min_size=1):
    pixels = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(len(labels), 3, 1, 1)
    images = LabelledImages(pixels, torch.from_numpy(labels))
    clients = split_clients(
        images,
        num_clients,
        scheme,
        seed=seed,
        classes_per_client=classes_per_client,
        alpha=alpha,
        min_client_size=min_size,
    )
    assert clients.images is images
    return clients


def assert_partition(clients, num_examples):
    assert all(ids.dtype == np.int64 and len(ids) and (np.diff(ids) > 0).all() for ids in clients)
    np.testing.assert_array_equal(np.sort(np.concatenate(clients)), np.arange(num_examples))


@few_examples
@given(class_sizes, st.sampled_from(["iid", "dirichlet", "quantity"]), st.data())
def test_disjoint_covering_seeded_and_never_empty(sizes, scheme, data):
    labels = labels_of(sizes)
    num_clients = data.draw(st.integers(1, len(labels)))
    min_size = data.draw(st.integers(1, len(labels) // num_clients))
    alpha = data.draw(st.sampled_from([1e-3, 0.1, 1.0, 100.0, 1e6]))
    seed = data.draw(st.integers(0, 3))
    clients = split(labels, scheme, num_clients, seed=seed, alpha=alpha, min_size=min_size)
    assert_partition(clients, len(labels))
    assert len(clients) == num_clients
    assert min(map(len, clients)) >= (1 if scheme == "iid" else min_size)
    if scheme == "iid":
        assert max(map(len, clients)) - min(map(len, clients)) <= 1
    again = split(labels, scheme, num_clients, seed=seed, alpha=alpha, min_size=min_size)
    assert all(map(np.array_equal, clients, again))


@few_examples
@given(class_sizes, st.data())
def test_label_skew_gives_every_client_its_number_of_classes(sizes, data):
    labels = labels_of(sizes)
    classes_per_client = data.draw(st.integers(1, len(sizes)))
    num_clients = data.draw(st.integers(1, 12))
    places = num_clients * classes_per_client
    assume(num_clients <= len(labels) and places >= len(sizes) and -(-places // len(sizes)) <= min(sizes))
    clients = split(labels, "label_skew", num_clients, classes_per_client=classes_per_client)
    assert_partition(clients, len(labels))
    counts = class_counts(clients.owner, labels, num_clients, len(sizes))
    assert ((counts > 0).sum(axis=1) == classes_per_client).all()
    owners = (counts > 0).sum(axis=0)
    assert owners.min() >= 1
    assert owners.max() - owners.min() <= 1
    for held in counts.T:  # a class is shared equally among its owners
        assert np.ptp(held[held > 0]) <= 1


@pytest.mark.parametrize("classes_per_client", [1, 2, 5, 10])
def test_label_skew_sizes_are_equal_where_classes_are(classes_per_client):
    clients = split(labels_of([40] * 10), "label_skew", 20, classes_per_client=classes_per_client)
    assert {len(ids) for ids in clients} == {20}


def test_label_skew_remainders_go_round():
    clients = split(labels_of([45] * 100), "label_skew", 100, classes_per_client=10)  # 4.5 of each class
    assert max(map(len, clients)) - min(map(len, clients)) <= 5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_client_holds_everything_in_order(scheme):
    (ids,) = split(labels_of([3, 4, 5]), scheme, 1, classes_per_client=3)
    np.testing.assert_array_equal(ids, np.arange(12))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_seeds_differ(scheme):
    labels = labels_of([50] * 4)
    first, second = (split(labels, scheme, 8, seed=seed) for seed in (0, 1))
    assert not all(map(np.array_equal, first, second))


@pytest.mark.parametrize(
    ("scheme", "num_clients", "options", "digest"),
    [
        ("iid", 7, {}, "f42108f4c8fccf86"),
        ("label_skew", 20, {"classes_per_client": 3}, "164428053d53860c"),
        ("label_skew", 9, {"classes_per_client": 4}, "ec8b2372450e6327"),
        ("dirichlet", 12, {"alpha": 0.1, "min_size": 5}, "1954cef426f447e7"),
        ("dirichlet", 60, {"alpha": 1e-3, "min_size": 2}, "ce5e28745c6d6983"),
        ("quantity", 12, {"alpha": 0.3, "min_size": 5}, "ef1380924cf34288"),
        ("quantity", 60, {"alpha": 1e-3, "min_size": 3}, "74440df0355db6fa"),
    ],
)
def test_a_seed_draws_what_it_drew_when_the_results_in_docs_were_made(scheme, num_clients, options, digest):
    clients = split(labels_of([40, 45, 60, 33, 50, 70]), scheme, num_clients, **options)
    assert hashlib.sha256(clients.owner.tobytes()).hexdigest()[:16] == digest


def test_alpha_orders_heterogeneity():
    labels = labels_of([100] * 10)
    splits = [split(labels, "dirichlet", 10, alpha=alpha) for alpha in (0.01, 0.3, 100)]
    classes_held = [(class_counts(clients.owner, labels, 10, 10) > 0).sum() for clients in splits]
    assert classes_held == sorted(classes_held)
    assert classes_held[-1] == 100


def test_quantity_varies_sizes_and_keeps_the_mix():
    labels = labels_of([1000] * 4)
    clients = split(labels, "quantity", 5, alpha=0.5)
    sizes = clients.sizes
    assert sizes.max() > 3 * sizes.min()
    mix = class_counts(clients.owner, labels, 5, 4) / sizes[:, None]
    np.testing.assert_allclose(mix[sizes > 300], 0.25, atol=0.08)


def test_repair_moves_no_more_than_is_lacking():
    owner = np.array([0] * 10 + [1] * 8 + [2])
    repaired = raise_to_min_size(owner, 4, 3, generator(0, "repair"))
    assert np.bincount(repaired).tolist() == [6, 7, 3, 3]  # five taken, each from the largest by then
    assert (repaired != owner).sum() == 5
    np.testing.assert_array_equal(raise_to_min_size(owner[:18], 2, 3, generator(0, "repair")), owner[:18])


@few_examples
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 3))
def test_repair_takes_from_the_first_of_the_largest(sizes, min_size):
    assume(sum(sizes) >= min_size * len(sizes))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.maximum(sizes, min_size)
    while expected.sum() > len(owner):
        expected[np.where(np.array(sizes) > min_size, expected, 0).argmax()] -= 1
    repaired = raise_to_min_size(owner, len(sizes), min_size, generator(0, "repair"))
    assert np.bincount(repaired).tolist() == expected.tolist()


@few_examples
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.floats(0, 1))
def test_largest_remainder_sums_and_stays_close(sizes, fraction):
    shares = fraction * np.array(sizes)
    whole = largest_remainder(shares, round(fraction * sum(sizes)), generator(0, "shares"))
    assert whole.sum() == round(fraction * sum(sizes))
    assert (np.abs(whole - shares) < 1 + 1e-9).all()
    assert (whole <= sizes).all()


def test_stratified_sample_takes_each_class_its_share():
    labels = labels_of([10, 20, 70])
    taken = stratified_sample(labels, 0.1, generator(0, "sample"))
    assert (np.diff(taken) > 0).all()
    assert np.bincount(labels[taken]).tolist() == [1, 2, 7]


@pytest.mark.parametrize(
    ("scheme", "num_clients", "options", "says"),
    [
        ("iid", 0, {}, "choose 1 to 60"),
        ("iid", 61, {}, "choose 1 to 60"),
        ("label_skew", 4, {"classes_per_client": 7}, "choose 1 to 6"),
        ("label_skew", 4, {"classes_per_client": 0}, "choose 1 to 6"),
        ("label_skew", 2, {"classes_per_client": 2}, "raise num_clients to 3 or classes_per_client to 3"),
        ("label_skew", 40, {"classes_per_client": 2}, "at or below 60"),
        ("dirichlet", 4, {"alpha": 0.0}, "above 0"),
        ("dirichlet", 4, {"alpha": float("nan")}, "above 0"),
        ("quantity", 4, {"alpha": float("inf")}, "at most"),
        ("quantity", 4, {"min_size": 16}, "choose 1 to 15"),
        ("dirichlet", 4, {"min_size": 0}, "choose 1 to 15"),
        ("label skew", 4, {}, "scheme 'label skew': expected one of iid, label_skew, dirichlet, quantity"),
    ],
)
def test_impossible_splits_say_what_would_work(scheme, num_clients, options, says):
    with pytest.raises(InputError, match=says):
        split(labels_of([10] * 6), scheme, num_clients, **options)


@pytest.mark.parametrize(("bound", "works"), [(60, True), (61, False)])
def test_what_the_label_skew_message_promises_holds(bound, works):
    labels = labels_of([10] * 6)
    if works:
        assert_partition(split(labels, "label_skew", bound), 60)
    else:
        with pytest.raises(InputError):
            split(labels, "label_skew", bound)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ten_thousand_clients_take_few_calls(scheme):
    labels, calls = labels_of([500] * 100), Counter[str]()
    sys.setprofile(lambda _frame, event, _argument: calls.update([event]))
    try:
        clients = split(labels, scheme, 10_000, alpha=0.1, min_size=2)
        class_counts(clients.owner, labels, 10_000, 100)
    finally:
        sys.setprofile(None)
    assert calls["call"] + calls["c_call"] < 100_000  # of Python; a loop over examples and clients takes millions
    assert_partition(clients, len(labels))
