"""Units that train apart from one start, and one round: vectors merged, the head fitted from clients' sums."""

import numpy as np
import pytest
import torch

from fedtalos.data.images import LabelledImages
from fedtalos.training.evaluation import evaluate
from fedtalos.training.federated.apart import train_apart
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.continual import Course
from fedtalos.training.federated.fedavg import fedavg
from fedtalos.training.federated.one_shot import one_shot
from fedtalos.training.federated.partition import split_clients
from fedtalos.training.federated.personal import personalised, with_own_vectors
from fedtalos.training.federated.stacked import stacked
from fedtalos.training.federated.tasks import clients_of_tasks, split_by_task
from fedtalos.training.federated.transforms import dropouts
from fedtalos.training.head_fitting import fit_head
from fedtalos.training.line_search import search_alpha
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters, head_mask
from fedtalos.training.task_accuracy import accuracy_of_head, probe_accuracy

LOCAL = LocalTraining(steps=2, batch_size=4, learning_rate=1e-3)


@pytest.fixture
def pictures() -> LabelledImages:
    """Images whose class can be seen: a bright row each."""
    pixels = torch.randint(90, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 5
    pixels[torch.arange(60), :, labels] += 120
    return LabelledImages(pixels, labels)


@pytest.fixture
def moving(vit) -> MaskedParameters:
    """A tenth of the blocks moves."""
    generator = torch.Generator().manual_seed(1)
    named = {name: p for name, p in vit.named_parameters() if name.startswith("blocks.")}
    return MaskedParameters(vit, {name: torch.rand(p.shape, generator=generator) < 0.1 for name, p in named.items()})


def apart(moving, clients, local=LOCAL, **how) -> tuple[list, dict[int, torch.Tensor]]:
    vectors: dict[int, torch.Tensor] = {}
    rounds = list(train_apart(moving, clients, local=local, keep=vectors.__setitem__, **how))
    return rounds, vectors


def test_units_that_train_once_are_a_round_of_all_clients_whose_updates_are_kept(moving, pictures):
    clients, before = split_clients(pictures, 7), moving.vector()
    rounds, vectors = apart(moving, clients)
    assert moving.vector().equal(before)
    assert [(r.number, r.clients) for r in rounds] == [(1 + client, (client,)) for client in range(7)]
    (together,) = fedavg(moving, clients, local=LOCAL, rounds=1, fraction=1)
    mean = sum(int(size) * vectors[client] for client, size in enumerate(clients.sizes)) / 60
    torch.testing.assert_close(moving.vector() - before, mean)
    assert sum((r.train for r in rounds[1:]), rounds[0].train).correct == together.train.correct


@pytest.mark.parametrize("units", [None, clients_of_tasks(7, 3)])
def test_units_that_train_once_share_stacks(moving, pictures, units):
    clients, asked = split_clients(pictures, 7), []
    how = {"units": units, "through": lambda _, seed: [dropouts(0.3, seed)]}
    local = LocalTraining(steps=2, batch_size=4, optimizer="sgd", learning_rate=0.1)

    def engine(*given):
        asked.append(given)
        return stacked(*given, size=4)

    rounds, vectors = apart(moving, clients, local, **how)
    others, in_stacks = apart(moving, clients, local, **how, engine=engine)
    assert len(asked) == 1
    assert any(r.lost for r in rounds)
    assert [(r.train.correct, r.lost) for r in rounds] == [(r.train.correct, r.lost) for r in others]
    for unit, vector in vectors.items():
        torch.testing.assert_close(in_stacks[unit], vector, rtol=1e-3, atol=1e-6)


def test_a_units_vector_does_not_depend_on_the_others(moving, pictures):
    clients = split_by_task(pictures, 4, ((0, 1, 4), (2, 3)))
    units = clients_of_tasks(4, 2)
    _, every = apart(moving, clients, units=units, rounds=2, seed=5)
    _, alone = apart(moving, clients, units=units[1:], rounds=2, seed=5)
    assert every[1].equal(alone[0])
    assert not every[0].equal(every[1])


@pytest.mark.parametrize("onward", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_training_apart_goes_on_where_it_was_stopped(moving, pictures, stop, onward):
    clients, units, start = split_clients(pictures, 4), clients_of_tasks(4, 2), moving.vector()
    _, whole = apart(moving, clients, units=units, rounds=2, onward=onward)
    first, second = {}, {}
    rounds = train_apart(moving, clients, local=LOCAL, units=units, rounds=2, onward=onward, keep=first.__setitem__)
    for round_ in rounds:
        if round_.number == stop:
            break
    reached = moving.vector()
    rounds.close()
    if stop == 2:
        first[0] = reached - start
    moving.write(reached)
    list(
        train_apart(
            moving,
            clients,
            local=LOCAL,
            units=units,
            rounds=2,
            onward=onward,
            start=start,
            done=stop,
            keep=second.__setitem__,
        )
    )
    together = first | second
    assert all(together[unit].equal(whole[unit]) for unit in (0, 1))
    assert moving.vector().equal(start)


def test_a_units_clients_need_not_be_neighbours(moving, pictures):
    clients = split_clients(pictures, 4)
    rounds, vectors = apart(moving, clients, units=[[0, 2], [3, 1]], rounds=2)
    assert [round_.clients for round_ in rounds[::2]] == [(0, 2), (3, 1)]
    sorted_by_unit = clients.only([0, 2, 3, 1])
    assert [ids.tolist() for ids in sorted_by_unit] == [clients[client].tolist() for client in (0, 2, 3, 1)]
    _, expected = apart(moving, sorted_by_unit, units=[range(2)], rounds=2)
    assert vectors[0].equal(expected[0])  # first clients, which name the draws, are alike


def test_a_client_without_images_pulls_no_mean(moving, pictures):
    """Its vector is 0: of nothing learnt, not of nothing to change."""
    start, owner = moving.vector(), split_clients(pictures, 2).owner

    def merged(count: int) -> torch.Tensor:
        moving.write(start)
        clients = Clients.of(pictures, owner, count)
        return one_shot(
            moving, clients, local=LOCAL, val=pictures, merge=lambda v: v.mean(0), alpha=0, head=None
        ).merged

    assert merged(3).equal(merged(2))
    assert merged(2).any()


def test_every_unit_has_a_fate_of_its_own(moving, pictures):
    """Drop-outs are drawn anew for each: else all clients that train apart would be there, or none."""
    rounds, vectors = apart(moving, split_clients(pictures, 12), through=lambda _own, seed: [dropouts(0.5, seed)])
    lost = [bool(round_.lost) for round_ in rounds]
    assert 0 < sum(lost) < 12
    assert [not vector.any() for vector in vectors.values()] == lost


def test_one_round_of_the_mean_is_a_round_of_fedavg(moving, pictures):
    """Of clients of one size, the mean of their vectors is what FedAvg's round moves, given the same draws."""
    clients, start = split_clients(pictures, 3), moving.vector()
    found = one_shot(moving, clients, local=LOCAL, val=pictures, merge=lambda v: v.mean(0), alpha=1.0, head=None)
    after = moving.vector()
    assert after.equal(start + found.merged)
    torch.testing.assert_close(found.merged, found.vectors.mean(0))
    assert found.bytes_up == found.bytes_down == 3 * moving.nbytes


def test_the_factor_is_measured_with_a_head_fitted_to_the_servers_images(moving, pictures):
    clients, start = split_by_task(pictures, 2, ((0, 1, 4), (2, 3))), moving.vector()
    found = one_shot(moving, clients, local=LOCAL, val=pictures, calibration=pictures, seed=3)
    assert found.bytes_up == moving.nbytes * 2 + fit_head(moving.model, pictures, holders=clients, val=pictures)

    def accuracy(alpha):
        moving.write(start + alpha * found.merged)
        fit_head(moving.model, pictures, val=pictures)
        return evaluate(moving, pictures).accuracy

    assert search_alpha(accuracy).alpha == found.alpha


def test_one_shot_repeats_to_the_bit_fits_the_head_and_is_never_worse_than_its_start(moving, pictures):
    clients, start = split_by_task(pictures, 2, ((0, 1, 4), (2, 3))), moving.vector()
    fit_head(moving.model, pictures, holders=clients, val=pictures)
    base = evaluate(moving, pictures).accuracy
    found = one_shot(moving, clients, local=LOCAL, val=pictures, head=None, seed=3)
    assert evaluate(moving, pictures).accuracy >= base
    moving.write(start)
    again = one_shot(moving, clients, local=LOCAL, val=pictures, seed=3)
    assert again.vectors.equal(found.vectors)
    assert again.alpha == found.alpha
    assert again.bytes_up > found.bytes_up
    refit = moving.model.head.weight.detach().clone()
    fit_head(moving.model, pictures, holders=clients, val=pictures)  # over the merged model's features: the same again
    assert refit.equal(moving.model.head.weight)


def test_a_clients_own_vector_makes_its_model(moving, pictures):
    clients, start = split_clients(pictures, 3), moving.vector()
    _, vectors = apart(moving, clients)
    for client in with_own_vectors(moving, vectors, alpha=0.5):
        assert moving.vector().equal(start + 0.5 * vectors[client])
    assert moving.vector().equal(start)
    tuned = {client: moving.vector() for client in personalised(moving, clients, [0, 1], LOCAL, seed=0)}
    for client in personalised(moving, clients, [0, 1], LOCAL, seed=0, alpha=0.5):
        torch.testing.assert_close(moving.vector(), (start + tuned[client]) / 2)
    for _ in personalised(moving, clients, [0], LOCAL, seed=0, alpha=0.0):
        assert moving.vector().equal(start)


def test_accuracy_with_the_task_known_chooses_among_its_classes():
    weight, bias = torch.eye(4), torch.zeros(4)
    features = torch.tensor([[3.0, 0, 2, 0], [0, 1, 0, 2], [0, 0, 1, 3], [5, 0, 0, 1]])
    labels = torch.tensor([0, 1, 2, 3])
    found = accuracy_of_head((weight, bias), features, labels, ((0, 1), (2, 3)))
    assert found.unknown.tolist() == [0.5, 0.0]
    assert found.known.tolist() == [1.0, 0.5]
    assert np.isnan(accuracy_of_head((weight, bias), features[:2], labels[:2], ((0, 1), (2, 3))).known[1])


def test_a_probe_reads_what_features_tell(vit, pictures):
    few = pictures.subset(torch.arange(0, 60, 5))
    assert probe_accuracy(vit, pictures, pictures, penalty=1e-4) > 0.9
    assert probe_accuracy(vit, few, few) == 1.0  # of one class


def test_average_accuracy_and_backward_transfer():
    course = Course(np.array([[0.9, 0.1, 0.0], [0.7, 0.8, 0.0], [0.6, 0.9, 0.5]]))
    assert course.average_accuracy == pytest.approx((0.6 + 0.9 + 0.5) / 3)
    assert course.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert np.isnan(Course(np.array([[0.9]])).backward_transfer)


def test_only_what_moves_is_sent(vit, pictures):
    moving = MaskedParameters(vit, head_mask(vit))
    found = one_shot(moving, split_clients(pictures, 2), local=LOCAL, val=pictures, alpha=0.5, head=None)
    assert found.vectors.shape == (2, len(moving))
