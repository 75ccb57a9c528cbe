import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points import Formula, Point, clients_of

from fedtalos.data.images import LabelledImages
from fedtalos.errors import BadUpdateError, InputError
from fedtalos.metrics import Metrics
from fedtalos.randomness import torch_generator
from fedtalos.training.federated.aggregation import median, robust
from fedtalos.training.federated.client_sampling import clients_per_round, sample_clients
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Lost, fedavg
from fedtalos.training.federated.traffic import Traffic
from fedtalos.training.federated.transforms import dropouts, stragglers
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters


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


def test_poisson_sampling_lets_each_client_come_by_itself():
    rounds = [sample_clients(20, 0.25, 0, number, "poisson") for number in range(2000)]
    came = torch.zeros(2000, 20)
    for number, chosen in enumerate(rounds):
        assert list(chosen) == sorted(set(chosen))
        came[number, list(chosen)] = 1
    assert (came.mean(0) - 0.25).abs().max() < 0.04
    counts = came.sum(1)  # binomial
    assert float(counts.mean()) == pytest.approx(20 * 0.25, abs=0.15)
    assert float(counts.var()) == pytest.approx(20 * 0.25 * 0.75, rel=0.1)
    pairs = torch.corrcoef(came.T) - torch.eye(20)
    assert pairs.abs().max() < 0.11
    assert rounds[3] == sample_clients(20, 0.25, 0, 3, "poisson") != sample_clients(20, 0.25, 1, 3, "poisson")
    assert sample_clients(20, 1.0, 0, 1, "poisson") == tuple(range(20))


def test_rounds_that_no_client_comes_to_leave_the_model_and_can_be_counted(vit):
    moving, clients = MaskedParameters(vit), clients_of([1, 1, 1])
    theta, traffic, algorithm = moving.vector(), Traffic(moving, FedAvg(), 3), FedAvg()

    def update(client, _adjust):
        moving.write(moving.vector() + client + 1)

    options = {"local": Formula(update), "rounds": 12, "fraction": 0.4, "sampling": "poisson", "seed": 1}
    sizes, met = [], Traffic(moving, FedAvg(), 3, first_contact=5)
    for round_ in fedavg(moving, clients, algorithm=algorithm, **options):
        sizes.append(len(round_.clients))
        theta = theta + (sum(round_.clients) / len(round_.clients) + 1 if round_.clients else 0)
        torch.testing.assert_close(moving.vector(), theta)
        assert traffic.count(round_) == (len(round_.clients) * moving.nbytes,) * 2
        met.count(round_)
    assert 0 in sizes
    assert len(set(sizes)) > 2
    resumed = Traffic(moving, FedAvg(), 3)
    resumed.skip(12, 0.4, 1, "poisson")
    assert np.array_equal(resumed._met, met._met)


def test_poisson_sampling_wants_a_mean(vit):
    clients = clients_of([1, 1, 1])
    local, robust_mean = Formula(lambda *_: None), FedAvg(aggregation=robust(median))
    with pytest.raises(InputError, match="sampling poisson: robust rules need a fixed number of clients"):
        next(fedavg(vit, clients, local=local, rounds=1, sampling="poisson", algorithm=robust_mean))
    with pytest.raises(InputError, match="sampling 'often': expected one of uniform, poisson"):
        next(fedavg(vit, clients, local=local, rounds=1, sampling="often"))


def test_a_thousand_of_a_million_clients_take_no_more_memory_than_ten():
    clients = clients_of(np.ones(1_000_000, np.int64))
    model = Point(torch.zeros(2, 1))

    def peak(fraction):
        rounds = fedavg(model, clients, local=Formula(lambda *_: None), rounds=1, fraction=fraction)
        tracemalloc.start()
        try:
            result = next(rounds)
            return len(result.clients), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(1e-5), peak(1e-3)
    assert (few[0], many[0]) == (10, 1000)
    assert many[1] - few[1] < 1000 * 300  # the numbers of the sampled; a list of all would be 8 MB
    assert many[1] < 5_000_000  # the sizes, four bytes for each of the registered


def test_mean_is_weighted_by_examples_and_bytes_are_counted(vit):
    moving, clients = MaskedParameters(vit), clients_of([10, 30, 60])
    start = moving.vector()

    def update(client, _adjust):
        assert torch.equal(moving.vector(), start)  # every client starts from the global values
        moving.write(start + client + 1)
        return Metrics(1.0, 1, int(clients.sizes[client]))

    traffic = Traffic(moving, FedAvg(), len(clients), first_contact=7)
    (result,) = fedavg(moving, clients, local=Formula(update), rounds=1, fraction=1.0)
    expected = start + (10 * 1 + 30 * 2 + 60 * 3) / 100
    torch.testing.assert_close(moving.vector(), expected, rtol=1e-5, atol=1e-5)
    assert result.train.examples == 100
    down, up = traffic.count(result)
    assert up == 3 * 4 * len(moving)
    assert down == up + 3 * 7


def some_images():
    pixels = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
    return LabelledImages(pixels, torch.arange(12) % 5)


def test_one_sgd_step_per_client_equals_one_central_step_on_the_union(vit):
    images, moving = some_images(), MaskedParameters(vit)
    theta = moving.copy()
    local = LocalTraining(
        steps=1, batch_size=12, optimizer="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, clip_norm=None
    )
    local.run(moving, images, np.arange(12), np.random.default_rng(0))
    central = moving.vector()
    moving.load(theta)
    clients = Clients.of(images, np.repeat([0, 1, 2], [2, 5, 5]), 3)
    list(fedavg(moving, clients, local=local, rounds=1, fraction=1.0))
    torch.testing.assert_close(moving.vector(), central, rtol=1e-4, atol=1e-6)


def test_resumed_rounds_count_first_contacts_as_uninterrupted_ones_do():
    clients, model = clients_of([1] * 10), Point(torch.zeros(2))

    def bytes_down(done):
        traffic = Traffic(MaskedParameters(model), FedAvg(), len(clients), first_contact=1000)
        traffic.skip(done, 0.3, 0)
        local = Formula(lambda *_: None)
        return [traffic.count(r)[0] for r in fedavg(model, clients, local=local, rounds=6, fraction=0.3, done=done)]

    assert bytes_down(0)[3:] == bytes_down(3)


def test_the_mask_holds_and_is_given_once(vit):
    images = some_images()
    mask = {"blocks.2.attn.qkv.weight": torch.zeros_like(vit.blocks[2].attn.qkv.weight, dtype=torch.bool)}
    mask["blocks.2.attn.qkv.weight"][5:40:3, ::2] = True
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    clients = Clients.of(images, np.arange(12) % 3, 3)
    list(fedavg(vit, clients, mask, local=LocalTraining(steps=2), rounds=2, fraction=0.7))
    for name, p in vit.named_parameters():
        chosen = mask.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[~chosen], before[name][~chosen])
        assert not chosen.any() or bool((p[chosen] != before[name][chosen]).all())
    with pytest.raises(ValueError, match="mask: given with MaskedParameters"):
        next(fedavg(MaskedParameters(vit, mask), clients, mask, local=LocalTraining(), rounds=1))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_a_fraction_that_is_no_share_is_refused(fraction):
    with pytest.raises(InputError, match=r"fraction .*: expected a share of clients above 0 and at most 1"):
        next(fedavg(Point(torch.zeros(2)), clients_of([1]), local=LocalTraining(), rounds=1, fraction=fraction))


class Diverging:
    """Clients add 1, but that some diverge."""

    def __init__(self, *diverging):
        self.model, self.diverging = Point(torch.zeros(3)), diverging

    def update(self, client, _adjust):
        self.model.x.detach().add_(1)
        if client in self.diverging:
            raise BadUpdateError("the loss became nan")

    def rounds(self, rounds=1, through=(), on_bad_client="stop"):
        return fedavg(
            self.model,
            clients_of([1, 2, 3, 4]),
            local=Formula(self.update),
            rounds=rounds,
            fraction=1.0,
            through=through,
            on_bad_client=on_bad_client,
        )


def test_a_client_that_diverges_ends_the_round_and_leaves_theta():
    clients = Diverging(2)
    with pytest.raises(BadUpdateError, match=r"^round 1, client 2: the loss became nan$"):
        list(clients.rounds())
    assert clients.model.x.tolist() == [0, 0, 0]


def test_or_the_round_goes_on_without_it():
    clients = Diverging(2)
    first, second = clients.rounds(2, on_bad_client="skip")
    assert first.lost == second.lost == {2: Lost("the loss became nan", sent=True)}
    assert first.train.examples == 3
    assert clients.model.x.tolist() == [2, 2, 2]


def test_a_round_without_any_update_leaves_theta_and_goes_on():
    clients = Diverging(0, 1, 2, 3)
    first, second = clients.rounds(2, on_bad_client="skip")
    assert set(first.lost) == set(second.lost) == {0, 1, 2, 3}
    assert first.train.examples == 0
    assert clients.model.x.tolist() == [0, 0, 0]


def test_a_client_without_images_sends_nothing_and_is_no_reason_to_stop():
    clients = Diverging()
    local = Formula(clients.update)
    (round_,) = fedavg(clients.model, clients_of([2, 0, 1]), local=local, rounds=1, fraction=1.0)
    assert round_.lost == {1: Lost("no images")}
    assert clients.model.x.tolist() == [1, 1, 1]


def test_dropouts_send_nothing_and_are_drawn_by_round_and_client():
    clients = Diverging()
    rounds = list(clients.rounds(300, through=[dropouts(0.25, seed=0)]))
    assert all(lost == Lost("dropped out") for r in rounds for lost in r.lost.values())
    assert sum(len(r.lost) for r in rounds) / (4 * 300) == pytest.approx(0.25, abs=0.04)
    assert [r.lost for r in clients.rounds(300, through=[dropouts(0.25, seed=0)])] == [r.lost for r in rounds]
    assert [r.lost for r in clients.rounds(300, through=[dropouts(0.25, seed=1)])] != [r.lost for r in rounds]
    silent = Traffic(MaskedParameters(clients.model), FedAvg(), 4)
    assert [silent.count(r)[1] for r in rounds] == [12 * (4 - len(r.lost)) for r in rounds]


def test_stragglers_are_the_same_in_every_round_and_more_of_them_the_shorter_the_deadline():
    late = {}
    for deadline in (1.0, 4.0, 16.0, 100.0):
        rounds = list(Diverging().rounds(3, through=[stragglers(deadline, slowest=10.0, seed=0, steps_of=lambda _: 4)]))
        assert rounds[0].lost == rounds[1].lost == rounds[2].lost
        assert all(lost == Lost("late") for lost in rounds[0].lost.values())
        late[deadline] = set(rounds[0].lost)
    assert late[1.0] == {0, 1, 2, 3} >= late[4.0] >= late[16.0] >= late[100.0] == set()
    assert 0 < len(late[16.0]) < 4
