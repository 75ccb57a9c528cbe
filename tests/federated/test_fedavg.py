import tracemalloc

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtalos.metrics import Metrics
from fedtalos.training.federated.fedavg import clients_per_round, fedavg, one_by_one, sample_clients
from fedtalos.training.loop import freeze_all_but, make_optimizer, train
from fedtalos.training.masked_parameters import Entries, named_tensors


def dense(vit):
    return Entries({name: torch.ones_like(p, dtype=torch.bool) for name, p in vit.named_parameters()})


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.floats(0.001, 1), st.integers(0, 9), st.integers(1, 50))
def test_sampling_is_without_replacement_and_a_function_of_its_source(clients, fraction, seed, number):
    chosen = sample_clients(clients, fraction, seed, number)
    assert len(set(chosen)) == len(chosen) == clients_per_round(clients, fraction)
    assert all(0 <= client < clients for client in chosen)
    assert chosen == sample_clients(clients, fraction, seed, number)


def test_sampling_is_uniform():
    counts = torch.zeros(20)
    for number in range(2000):
        counts[list(sample_clients(20, 0.25, 0, number))] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.04


def test_a_thousand_of_a_million_clients_take_no_more_memory_than_ten():
    model = torch.nn.Linear(2, 1)
    entries = dense(model)
    sizes = np.ones(1_000_000, np.int32)

    def peak(fraction):
        clients = one_by_one(model, entries, lambda *_: Metrics(1.0, 1, 1))
        rounds = fedavg(model, entries, clients, sizes, fraction=fraction, rounds=1, seed=0)
        tracemalloc.start()
        try:
            result = next(rounds)
            return len(result.clients), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(1e-5), peak(1e-3)
    assert (few[0], many[0]) == (10, 1000)
    assert many[1] - few[1] < 1000 * 300  # the numbers of the sampled; a list of all would be 8 MB
    assert many[1] < 2_000_000  # a byte for each of the registered


def test_mean_is_weighted_by_examples_and_bytes_are_counted(vit):
    entries, tensors = dense(vit), named_tensors(vit)
    start = entries.gather(tensors)
    sizes = np.array([10, 30, 60])

    def update(number, client):
        assert torch.equal(entries.gather(tensors), start)  # every client starts from the global values
        entries.scatter(start + client + 1, tensors)
        return Metrics(1.0, 1, int(sizes[client]))

    rounds = fedavg(
        vit, entries, one_by_one(vit, entries, update), sizes, fraction=1.0, rounds=1, seed=0, first_contact_bytes=7
    )
    result = next(rounds)
    expected = start + (10 * 1 + 30 * 2 + 60 * 3) / 100
    torch.testing.assert_close(entries.gather(tensors), expected, rtol=1e-5, atol=1e-5)
    assert result.train.examples == 100
    assert result.bytes_up == 3 * 4 * len(entries)
    assert result.bytes_down == result.bytes_up + 3 * 7


def test_one_sgd_step_per_client_equals_one_central_step_on_the_union(vit, images, labels):
    start = {name: p.detach().clone() for name, p in vit.named_parameters()}
    entries = dense(vit)
    options = {"rule": "sgd", "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}

    def step(chosen):
        optimizer = make_optimizer(vit, entries, **options)
        batches = [(images[chosen], labels[chosen])]
        return train(vit, batches, optimizer, entries, learning_rate=lambda _: 0.1, clip_norm=None)

    freeze_all_but(vit, entries)
    step(slice(0, 12))
    central = entries.gather(named_tensors(vit))
    vit.load_state_dict(start)
    parts = [slice(0, 2), slice(2, 7), slice(7, 12)]
    sizes = np.array([2, 5, 5])
    clients = one_by_one(vit, entries, lambda _, client: step(parts[client]))
    list(fedavg(vit, entries, clients, sizes, fraction=1.0, rounds=1, seed=0))
    torch.testing.assert_close(entries.gather(named_tensors(vit)), central, rtol=1e-4, atol=1e-6)


def test_resumed_rounds_count_first_contacts_as_uninterrupted_ones_do(vit):
    entries = dense(vit)

    def bytes_down(done):
        def update(number, client):
            return Metrics()

        sizes = np.ones(10, np.int32)
        rounds = fedavg(
            vit,
            entries,
            one_by_one(vit, entries, update),
            sizes,
            fraction=0.3,
            rounds=6,
            seed=0,
            done=done,
            first_contact_bytes=1000,
        )
        return [r.bytes_down for r in rounds]

    assert bytes_down(0)[3:] == bytes_down(3)
