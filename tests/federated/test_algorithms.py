"""Server rules, SCAFFOLD and FedNova against published formulas written as plain loops, on quadratics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points import Formula, Point, clients_of
from torch import nn

from fedtalos.data.images import LabelledImages
from fedtalos.metrics import Metrics
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.federated.aggregation import robust, trimmed_mean
from fedtalos.training.federated.algorithms import (
    ALGORITHMS,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedNova,
    FedProx,
    FedYogi,
    Scaffold,
)
from fedtalos.training.federated.algorithms.fednova import local_progress
from fedtalos.training.federated.client_sampling import sample_clients
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Lost, Update, fedavg, one_by_one
from fedtalos.training.federated.privacy import noisy_mean
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.loop import train
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.sparse_optimizer import make_optimizer

K, P = 6, 8
MASKS = {
    "dense": torch.ones(P, dtype=torch.bool),
    "mask": torch.tensor([True, False, True, True, False, False, True, False]),
}


@pytest.fixture(params=MASKS)
def mask(request):
    return MASKS[request.param]


class Quadratics:
    """Client k has 1/2 (x - minima_k)^T diag(curvatures_k) (x - minima_k), and takes plain SGD steps on it."""

    def __init__(self, mask, *, steps, rate=0.05, sizes=(10,) * K, same_curvature=False):
        draw = np.random.default_rng(0)
        self.mask, self.rate, self.sizes = mask, rate, np.array(sizes)
        self.steps = np.full(K, steps) if isinstance(steps, int) else np.array(steps)
        self.minima = torch.tensor(draw.normal(size=(K, P)), dtype=torch.float32)
        self.curvatures = torch.tensor(draw.uniform(0.5, 2, (K, P)), dtype=torch.float32)
        if same_curvature:
            self.curvatures[:] = 1
        self.model = Point(torch.tensor(draw.normal(size=P), dtype=torch.float32))
        self.start = self.x.clone()

    @property
    def x(self):
        return self.model.x.detach()

    @property
    def optimum(self):
        """Of the sum of all clients' losses, each weighted by its size, over the entries that move."""
        weights = torch.tensor(self.sizes, dtype=torch.float32)[:, None] * self.curvatures
        return torch.where(self.mask, (weights * self.minima).sum(0) / weights.sum(0), self.start)

    def gradient(self, client, x):
        return self.curvatures[client] * (x - self.minima[client])

    def update(self, client, adjust):
        for _ in range(self.steps[client]):
            self.x[self.mask] -= self.rate * adjust(self.gradient(client, self.x)[self.mask])
        return Metrics(1.0, 1, 1)

    def engine(self, moving, clients, _local, seed, algorithm):
        """One by one, each client with its own number of steps, whatever its number of images."""

        def updates(number, chosen, theta):
            for client in chosen:
                local = Formula(self.update, lambda _examples, client=client: int(self.steps[client]))
                yield from one_by_one(moving, clients, local, seed, algorithm)(number, [client], theta)

        return updates

    def rounds(self, rounds, algorithm=None, *, fraction=1.0, **options):
        by_size = dict(zip(self.sizes.tolist(), self.steps.tolist(), strict=True))
        going = fedavg(
            self.model,
            clients_of(self.sizes),
            {"x": self.mask},
            local=Formula(self.update, by_size.__getitem__),
            rounds=rounds,
            fraction=fraction,
            algorithm=algorithm,
            engine=self.engine,
            **options,
        )
        for _ in going:
            assert torch.equal(self.x[~self.mask], self.start[~self.mask])
            yield self.x.clone()


def pseudo_gradients(mask, algorithm, rounds=8):
    """(theta before, mean) of every round that the server saw, and theta after it: (A,) each."""
    seen, step = [], algorithm.step

    def watched(theta, mean):
        new = step(theta.clone(), mean.clone())
        seen.append((theta, mean, new))
        return new

    algorithm.step = watched
    list(Quadratics(mask, steps=3).rounds(rounds, algorithm, fraction=0.5))
    return seen


def test_fedavgm_of_rate_1_without_momentum_is_fedavg_to_the_bit(mask):
    ours = Quadratics(mask, steps=3, sizes=(1, 2, 3, 4, 5, 7)).rounds(5, FedAvgM(1.0, 0.0), fraction=0.5)
    plain = Quadratics(mask, steps=3, sizes=(1, 2, 3, 4, 5, 7)).rounds(5, FedAvg(), fraction=0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 0.9), (0.3, 0.5), (2.0, 0.0)])
def test_fedavgm_is_torch_sgd_on_pseudo_gradients(mask, rate, momentum):
    seen = pseudo_gradients(mask, FedAvgM(rate, momentum))
    parameter = nn.Parameter(seen[0][0].clone())
    optimizer = torch.optim.SGD([parameter], lr=rate, momentum=momentum)
    for before, mean, after in seen:
        parameter.grad = before - mean
        optimizer.step()
        torch.testing.assert_close(after, parameter.detach(), rtol=1e-5, atol=1e-6)


def adaptive(rule, learning_rate, beta1, beta2, tau):
    if rule == "fedadagrad":
        return FedAdagrad(learning_rate, beta1, tau)
    return {"fedadam": FedAdam, "fedyogi": FedYogi}[rule](learning_rate, beta1, beta2, tau)


@pytest.mark.parametrize("rule", ["fedadagrad", "fedadam", "fedyogi"])
def test_adaptive_rules_are_algorithm_2_of_reddi_et_al(mask, rule):
    eta, beta1, beta2, tau = 0.1, 0.8, 0.95, 1e-2
    algorithm = adaptive(rule, eta, beta1, beta2, tau)
    seen = pseudo_gradients(mask, algorithm)
    count = int(mask.sum())
    assert {name: tensor.shape for name, tensor in algorithm.state.items()} == {"m": (count,), "v": (count,)}
    x = seen[0][0].double().tolist()
    m, v = [0.0] * count, [tau**2] * count
    for before, mean, after in seen:
        for j in range(count):
            delta = float(mean[j]) - float(before[j])
            m[j] = beta1 * m[j] + (1 - beta1) * delta
            if rule == "fedadagrad":
                v[j] = v[j] + delta**2
            elif rule == "fedadam":
                v[j] = beta2 * v[j] + (1 - beta2) * delta**2
            else:
                v[j] = v[j] - (1 - beta2) * delta**2 * float(np.sign(v[j] - delta**2))
            x[j] = x[j] + eta * m[j] / (v[j] ** 0.5 + tau)
        torch.testing.assert_close(after.double(), torch.tensor(x, dtype=torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["fedadagrad", "fedadam", "fedyogi"])
def test_adaptive_rules_find_the_minimum(mask, rule):
    task = Quadratics(mask, steps=1)
    rate = 0.5 if rule == "fedadagrad" else 0.05  # its steps shrink for good
    *_, x = task.rounds(400, adaptive(rule, rate, beta1=0.5, beta2=0.9, tau=1e-2))
    torch.testing.assert_close(x, task.optimum, rtol=0, atol=0.02)


def published_scaffold(task, rounds, fraction):
    """Karimireddy et al. (2020), algorithm 1 with option II and a global rate of 1, in float64."""
    x, minima, curvatures = task.start.double(), task.minima.double(), task.curvatures.double()
    c, c_of = torch.zeros(P).double(), torch.zeros(K, P).double()
    moves = task.mask.double()
    for number in range(1, rounds + 1):
        chosen = sample_clients(K, fraction, 0, number)
        dy, dc = torch.zeros(P).double(), torch.zeros(P).double()
        for i in chosen:
            y = x.clone()
            for _ in range(task.steps[i]):
                y = y - task.rate * moves * (curvatures[i] * (y - minima[i]) - c_of[i] + c)
            new = c_of[i] - c + (x - y) / (int(task.steps[i]) * task.rate)
            dy, dc = dy + (y - x), dc + moves * (new - c_of[i])
            c_of[i] = moves * new
        x, c = x + dy / len(chosen), c + dc / K
        yield x


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scaffold_is_the_published_algorithm_with_option_2(mask, fraction):
    task = Quadratics(mask, steps=[4, 3, 5, 4, 2, 6])
    expected = published_scaffold(task, 20, fraction)
    for found, wanted in zip(task.rounds(20, Scaffold(), fraction=fraction), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_scaffold_finds_the_optimum_where_fedavg_with_several_steps_does_not(mask):
    task, plain = (Quadratics(mask, steps=10, sizes=(3, 5, 7, 9, 11, 13)) for _ in range(2))
    *_, x = task.rounds(200, Scaffold())
    torch.testing.assert_close(x, task.optimum, rtol=0, atol=1e-5)
    *_, drifted = plain.rounds(200)
    assert (drifted - plain.optimum).abs().max() > 0.02


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_c_is_the_mean_of_all_clients_control_variates(mask, fraction):
    task = Quadratics(mask, steps=4, sizes=(3, 5, 7, 9, 11, 13))
    algorithm = Scaffold()
    state = algorithm.state
    for number, _ in enumerate(task.rounds(12, algorithm, fraction=fraction), 1):
        met = {client for n in range(1, number + 1) for client in sample_clients(K, fraction, 0, n)}
        assert state.keys() == {"c"} | {f"c_{client}" for client in met}
        mean = sum(state[f"c_{client}"] * float(task.sizes[client] / task.sizes.sum()) for client in met)
        torch.testing.assert_close(state["c"], mean, rtol=1e-4, atol=1e-6)


def test_the_first_round_of_scaffold_is_fedavg_to_the_bit(mask):
    assert torch.equal(next(Quadratics(mask, steps=4).rounds(1, Scaffold())), next(Quadratics(mask, steps=4).rounds(1)))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_local_progress_is_how_far_torch_sgd_goes_on_gradients_of_1(momentum, steps):
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum)
    for _ in range(steps):
        parameter.grad = -torch.ones_like(parameter)
        optimizer.step()
    assert local_progress(steps, momentum) == pytest.approx(parameter.item())


def test_fednova_with_equal_steps_is_fedavg_to_the_bit(mask):
    sizes = (3, 5, 7, 9, 11, 13)
    ours = Quadratics(mask, steps=3, sizes=sizes).rounds(5, FedNova(), fraction=0.5)
    plain = Quadratics(mask, steps=3, sizes=sizes).rounds(5, fraction=0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_fednova_lets_the_first_client_be_without_images(mask):
    found, clients = FedNova(), np.array([0, 4, 8])
    weights = found.weights(clients, LocalTraining(epochs=1, batch_size=2, optimizer="sgd", momentum=0.0))
    assert weights[0] == 0
    assert weights[1] / weights[2] == 1  # twice the images, twice the steps


def test_fednova_is_the_published_update(mask):
    task = Quadratics(mask, steps=[1, 9, 2, 3, 4, 7], sizes=(3, 5, 7, 9, 11, 13))
    x = task.start.double()
    for number, found in enumerate(task.rounds(10, FedNova(), fraction=0.5), 1):
        chosen = list(sample_clients(K, 0.5, 0, number))
        shares, steps = task.sizes[chosen] / task.sizes[chosen].sum(), task.steps[chosen]
        directions = []
        for i in chosen:
            y = x.clone()
            for _ in range(task.steps[i]):
                y -= task.rate * task.mask * task.gradient(i, y)
            directions.append((x - y) / int(task.steps[i]))
        x = x - float(shares @ steps) * sum(p * d for p, d in zip(shares.tolist(), directions, strict=True))
        torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-5)


def test_fednova_is_not_drawn_to_clients_that_take_more_steps_as_fedavg_is(mask):
    options = {"steps": [1, 40, 2, 3, 5, 8], "rate": 4e-3, "sizes": (3, 5, 7, 9, 11, 13), "same_curvature": True}
    task, plain = (Quadratics(mask, **options) for _ in range(2))
    *_, x = task.rounds(750, FedNova())
    torch.testing.assert_close(x, task.optimum, rtol=0, atol=0.03)
    *_, biased = plain.rounds(750)
    counts = torch.tensor(plain.sizes * plain.steps)[:, None]
    by_steps = torch.where(mask, (counts * plain.minima).sum(0) / counts.sum(), plain.start)
    torch.testing.assert_close(biased, by_steps, rtol=0, atol=0.05)
    assert (biased - plain.optimum)[mask].abs().max() > 0.3


def half(vit):
    """A mask of three tensors: some rows, scattered entries, and a whole bias."""
    rows = torch.zeros_like(vit.blocks[2].attn.qkv.weight, dtype=torch.bool)
    rows[5:40:3] = True
    scattered = torch.rand(vit.blocks[4].mlp.fc1.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    return {
        "blocks.2.attn.qkv.weight": rows,
        "blocks.4.mlp.fc1.weight": scattered.to(rows.device),
        "head.bias": torch.ones_like(vit.head.bias, dtype=torch.bool),
    }


@pytest.mark.parametrize("masked", [False, True])
def test_fedprox_trains_on_the_loss_with_its_proximal_term(vit, images, labels, masked):
    masks = half(vit) if masked else {name: torch.ones_like(p, dtype=torch.bool) for name, p in vit.named_parameters()}
    mu = 3.0
    theta = {name: p.detach().clone() for name, p in vit.named_parameters()}
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    for x, y in batches:
        loss = nn.functional.cross_entropy(vit(x), y)
        terms = [(p, theta[name], masks[name]) for name, p in vit.named_parameters() if name in masks]
        loss = loss + mu / 2 * sum(((p - t)[m] ** 2).sum() for p, t, m in terms)
        for (p, _, m), gradient in zip(terms, torch.autograd.grad(loss, [p for p, *_ in terms]), strict=True):
            p.data -= 0.1 * gradient * m
    moving = MaskedParameters(vit, masks)
    expected = moving.vector()
    vit.load_state_dict(theta)
    optimizer = make_optimizer(moving.parameters, moving.entries, rule="sgd", learning_rate=0.1, momentum=0.0)
    adjust = FedProx(mu).client_side(moving, None, len(batches))
    train(moving, batches, optimizer, learning_rate=lambda _: 0.1, adjust=adjust)
    torch.testing.assert_close(moving.vector(), expected, rtol=1e-4, atol=1e-6)
    for name, tensor in vit.named_parameters():
        frozen = ~masks[name] if name in masks else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[frozen], theta[name][frozen])


def test_fedprox_is_the_published_update(mask):
    task, mu = Quadratics(mask, steps=[1, 9, 2, 3, 4, 7], sizes=(3, 5, 7, 9, 11, 13)), 0.7
    x = task.start.double()
    for number, theirs in enumerate(task.rounds(10, FedProx(mu), fraction=0.5), 1):
        chosen = list(sample_clients(K, 0.5, 0, number))
        ends = []
        for i in chosen:
            y = x.clone()
            for _ in range(task.steps[i]):
                y = y - task.rate * mask * (task.gradient(i, y) + mu * (y - x))
            ends.append(y)
        shares = task.sizes[chosen] / task.sizes[chosen].sum()
        x = sum(p * y for p, y in zip(shares.tolist(), ends, strict=True))
        torch.testing.assert_close(theirs.double(), x, rtol=1e-4, atol=1e-5)


def test_every_algorithm_has_its_name():
    assert {name: algorithm.__name__.lower() for name, algorithm in ALGORITHMS.items()} == {n: n for n in ALGORITHMS}


HOW_LOST = {
    "silent": lambda update: Lost("dropped out"),
    "sent": lambda update: Lost("the loss became nan", sent=True),
    "not finite": lambda update: Update([part * torch.nan for part in update.values], update.metrics, update.reply),
    "cut": lambda update: Update([part[:-1] for part in update.values], update.metrics, update.reply),
}
HOW_REPLIES_ARE_LOST = {
    "not finite": lambda reply: reply * torch.nan,
    "infinite": lambda reply: torch.full_like(reply, torch.inf),
    "cut": lambda reply: reply[:-1],
    "long": lambda reply: torch.cat([reply, reply]),
}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(ALGORITHMS)),
    which=st.sampled_from(sorted(MASKS)),
    how=st.sampled_from(sorted(HOW_LOST)),
    fraction=st.sampled_from([0.2, 0.5, 1.0]),
    seed=st.integers(0, 3),
    lost=st.sets(st.integers(1, 6), min_size=1, max_size=4),
)
def test_a_round_in_which_every_update_was_lost_leaves_no_trace(name, which, how, fraction, seed, lost):
    def losing(updates):
        def changed(number, chosen, theta):
            for client, update in updates(number, chosen, theta):
                yield client, HOW_LOST[how](update) if number in lost else update

        return changed

    algorithm = ALGORITHMS[name]()
    task = Quadratics(MASKS[which], steps=[4, 3, 5, 4, 2, 6], sizes=(3, 5, 7, 9, 11, 13))
    x, state = task.x.clone(), {}
    going = task.rounds(6, algorithm, fraction=fraction, seed=seed, through=[losing], on_bad_client="skip")
    for number, after in enumerate(going, 1):
        if number in lost:
            assert torch.equal(after, x)
            assert algorithm.state.keys() == state.keys()
            assert all(torch.equal(tensor, state[key]) for key, tensor in algorithm.state.items())
        else:
            assert not torch.equal(after, x)
        x, state = after, {key: tensor.clone() for key, tensor in algorithm.state.items()}


def losing(who, how):
    """A transform that makes the updates of the clients that ``who`` (round, client) names what ``how`` makes."""

    def transform(updates):
        def changed(number, chosen, theta):
            for client, update in updates(number, chosen, theta):
                yield client, how(update) if who(number, client) else update

        return changed

    return transform


def ends(name, which, transform, *, rounds=4, **options):
    """Values after each round, and what the server keeps then."""
    algorithm = ALGORITHMS[name]()
    task = Quadratics(MASKS[which], steps=[4, 3, 5, 4, 2, 6], sizes=(3, 5, 7, 9, 11, 13))
    going = task.rounds(rounds, algorithm, through=[transform], on_bad_client="skip", **options)
    return [(x, {key: tensor.clone() for key, tensor in algorithm.state.items()}) for x in going]


def assert_same_ends(found, expected):
    for (x, state), (wanted, kept) in zip(found, expected, strict=True):
        assert torch.equal(x, wanted)
        assert state.keys() == kept.keys()
        assert all(torch.equal(tensor, kept[key]) for key, tensor in state.items())


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(ALGORITHMS)),
    which=st.sampled_from(sorted(MASKS)),
    how=st.sampled_from(sorted(HOW_LOST)),
    lost=st.sets(st.tuples(st.integers(1, 4), st.integers(0, K - 1)), max_size=12),
)
def test_who_is_refused_leaves_as_much_as_who_never_answered(name, which, how, lost):
    refused, silent = (
        ends(name, which, losing(lambda *who: who in lost, HOW_LOST[way]), fraction=0.5) for way in (how, "silent")
    )
    assert_same_ends(refused, silent)


@pytest.mark.parametrize("how", HOW_REPLIES_ARE_LOST)
def test_a_reply_that_cannot_be_kept_spoils_its_update(mask, how):
    which = next(name for name, tensor in MASKS.items() if tensor is mask)
    spoilt = losing(
        lambda number, client: client == number,
        lambda update: replace(update, reply=HOW_REPLIES_ARE_LOST[how](update.reply)),
    )
    assert_same_ends(
        ends("scaffold", which, spoilt),
        ends("scaffold", which, losing(lambda number, client: client == number, HOW_LOST["silent"])),
    )


MADE = {
    **ALGORITHMS,
    "fedadam, trimmed": lambda: FedAdam(aggregation=robust(trimmed_mean, 1)),
    "fedavg, private": lambda: FedAvg(aggregation=noisy_mean(1.0, clip=0.5)),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("masked", [False, True])
def test_resumed_with_its_state_is_uninterrupted_bit_for_bit(name, masked):
    """On real training, of which every client has another number of images, and so of steps."""
    pixels = torch.randint(0, 256, (26, 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
    owner = np.repeat(np.arange(4), [3, 5, 7, 11])
    clients = Clients.of(LabelledImages(pixels, torch.arange(26) % 5), owner, 4)
    local = LocalTraining(epochs=1, batch_size=4, optimizer="sgd", learning_rate=0.05)
    model = VisionTransformer(Architecture("micro", 8, 4, 5), torch_generator(0, "test"))
    moving = MaskedParameters(model, half(model) if masked else None)
    theta, saved, straight = moving.copy(), {}, MADE[name]()

    def rounds(algorithm, done):
        return fedavg(moving, clients, local=local, rounds=4, fraction=0.75, algorithm=algorithm, done=done)

    for round_ in rounds(straight, 0):
        state = {key: tensor.clone() for key, tensor in straight.state.items()}
        saved[round_.number] = (moving.copy(), state)
    assert not torch.equal(moving.copy().vector, theta.vector)
    for done in (1, 3):
        resumed = MADE[name]()
        values, state = saved[done]
        moving.load(values)
        resumed.state |= {key: tensor.clone() for key, tensor in state.items()}
        assert [round_.number for round_ in rounds(resumed, done)] == list(range(done + 1, 5))
        assert torch.equal(moving.copy().vector, saved[4][0].vector)
        assert resumed.state.keys() == straight.state.keys()
        assert all(torch.equal(tensor, straight.state[key]) for key, tensor in resumed.state.items())
