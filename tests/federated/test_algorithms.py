"""Server rules, SCAFFOLD and FedNova against published formulas written as plain loops, on quadratics."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedtalos.metrics import Metrics
from fedtalos.training.federated.algorithms.drift import Exchange, Scaffold, proximal
from fedtalos.training.federated.algorithms.server import NormalisedAveraging, ServerAdaptive, ServerSGD, local_progress
from fedtalos.training.federated.fedavg import fedavg, one_by_one, sample_clients
from fedtalos.training.loop import freeze_all_but, make_optimizer, train
from fedtalos.training.masked_parameters import Entries, named_tensors

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
        self.model = nn.Module()
        self.model.x = nn.Parameter(torch.tensor(draw.normal(size=P), dtype=torch.float32))
        self.start = self.x.clone()
        self.entries = Entries({"x": mask})

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

    def update(self, adjust, _number, client):
        adjust_gradient = adjust(client)
        for _ in range(self.steps[client]):
            gradient = self.gradient(client, self.x)[self.mask]
            self.x[self.mask] -= self.rate * adjust_gradient(gradient)
        return Metrics(1.0, 1, 1)

    def rounds(self, rounds, *, fraction=1.0, adjust=lambda _: lambda gradient: gradient, wrap=lambda c: c, **options):
        clients = wrap(one_by_one(self.model, self.entries, partial(self.update, adjust)))
        weights = options.pop("weights", self.sizes)
        going = fedavg(self.model, self.entries, clients, weights, fraction=fraction, rounds=rounds, seed=0, **options)
        for _ in going:
            assert torch.equal(self.x[~self.mask], self.start[~self.mask])
            yield self.x.clone()

    def scaffold(self, rounds, fraction=1.0):
        exchange, state = Exchange(), {}
        scaffold = Scaffold(exchange, self.sizes, state)
        found = self.rounds(
            rounds,
            fraction=fraction,
            adjust=lambda client: exchange.adjust(client, int(self.steps[client])),
            wrap=partial(scaffold.controlled, self.entries),
        )
        for x in found:
            yield x, state


def pseudo_gradients(mask, server, rounds=8):
    """(theta before, mean) of every round that the server saw, and theta after it: (A,) each."""
    seen = []

    def watched(clients, theta, mean):
        new = server(clients, theta.clone(), mean.clone())
        seen.append((theta, mean, new))
        return new

    list(Quadratics(mask, steps=3).rounds(rounds, fraction=0.5, server=watched))
    return seen


def test_server_sgd_of_rate_1_without_momentum_is_fedavg_to_the_bit(mask):
    server = ServerSGD({}, learning_rate=1.0, momentum=0.0)
    ours = Quadratics(mask, steps=3, sizes=(1, 2, 3, 4, 5, 7)).rounds(5, fraction=0.5, server=server)
    plain = Quadratics(mask, steps=3, sizes=(1, 2, 3, 4, 5, 7)).rounds(5, fraction=0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 0.9), (0.3, 0.5), (2.0, 0.0)])
def test_fedavgm_is_torch_sgd_on_pseudo_gradients(mask, rate, momentum):
    seen = pseudo_gradients(mask, ServerSGD({}, learning_rate=rate, momentum=momentum))
    parameter = nn.Parameter(seen[0][0].clone())
    optimizer = torch.optim.SGD([parameter], lr=rate, momentum=momentum)
    for before, mean, after in seen:
        parameter.grad = before - mean
        optimizer.step()
        torch.testing.assert_close(after, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["fedadagrad", "fedadam", "fedyogi"])
def test_adaptive_rules_are_algorithm_2_of_reddi_et_al(mask, rule):
    eta, beta1, beta2, tau = 0.1, 0.8, 0.95, 1e-2
    state: dict[str, torch.Tensor] = {}
    server = ServerAdaptive(rule, state, learning_rate=eta, beta1=beta1, beta2=beta2, tau=tau)
    seen = pseudo_gradients(mask, server)
    count = int(mask.sum())
    assert {name: tensor.shape for name, tensor in state.items()} == {"m": (count,), "v": (count,)}
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
    server = ServerAdaptive(rule, {}, learning_rate=rate, beta1=0.5, beta2=0.9, tau=1e-2)
    *_, x = task.rounds(400, server=server)
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
    for (found, _), wanted in zip(task.scaffold(20, fraction), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_scaffold_finds_the_optimum_where_fedavg_with_several_steps_does_not(mask):
    task, plain = (Quadratics(mask, steps=10, sizes=(3, 5, 7, 9, 11, 13)) for _ in range(2))
    *_, (x, _) = task.scaffold(200)
    torch.testing.assert_close(x, task.optimum, rtol=0, atol=1e-5)
    *_, drifted = plain.rounds(200)
    assert (drifted - plain.optimum).abs().max() > 0.02


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_c_is_the_mean_of_all_clients_control_variates(mask, fraction):
    task = Quadratics(mask, steps=4, sizes=(3, 5, 7, 9, 11, 13))
    for number, (_, state) in enumerate(task.scaffold(12, fraction), 1):
        met = {client for n in range(1, number + 1) for client in sample_clients(K, fraction, 0, n)}
        assert state.keys() == {"c"} | {f"c_{client}" for client in met}
        mean = sum(state[f"c_{client}"] * float(task.sizes[client] / task.sizes.sum()) for client in met)
        torch.testing.assert_close(state["c"], mean, rtol=1e-4, atol=1e-6)


def test_the_first_round_of_scaffold_is_fedavg_to_the_bit(mask):
    (first, _), *_ = Quadratics(mask, steps=4).scaffold(1)
    assert torch.equal(first, next(Quadratics(mask, steps=4).rounds(1)))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_local_progress_is_how_far_torch_sgd_goes_on_gradients_of_1(momentum, steps):
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum)
    for _ in range(steps):
        parameter.grad = -torch.ones_like(parameter)
        optimizer.step()
    assert local_progress(steps, momentum) == pytest.approx(parameter.item())


def nova(task, rounds, fraction=1.0):
    server = NormalisedAveraging(task.sizes, np.array([local_progress(int(n), 0.0) for n in task.steps]))
    return task.rounds(rounds, fraction=fraction, server=server, weights=server.weights)


def test_fednova_with_equal_steps_is_fedavg_to_the_bit(mask):
    sizes = (3, 5, 7, 9, 11, 13)
    ours = nova(Quadratics(mask, steps=3, sizes=sizes), 5, fraction=0.5)
    plain = Quadratics(mask, steps=3, sizes=sizes).rounds(5, fraction=0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_fednova_is_the_published_update(mask):
    task = Quadratics(mask, steps=[1, 9, 2, 3, 4, 7], sizes=(3, 5, 7, 9, 11, 13))
    x = task.start.double()
    for number, found in enumerate(nova(task, 10, fraction=0.5), 1):
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
    options = {"steps": [1, 40, 2, 3, 5, 8], "rate": 2e-3, "sizes": (3, 5, 7, 9, 11, 13), "same_curvature": True}
    task, plain = (Quadratics(mask, **options) for _ in range(2))
    *_, x = nova(task, 1500)
    torch.testing.assert_close(x, task.optimum, rtol=0, atol=0.03)
    *_, biased = plain.rounds(1500)
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
        "blocks.4.mlp.fc1.weight": scattered,
        "head.bias": torch.ones_like(vit.head.bias, dtype=torch.bool),
    }


@pytest.mark.parametrize("masked", [False, True])
def test_fedprox_trains_on_the_loss_with_its_proximal_term(vit, images, labels, masked):
    masks = half(vit) if masked else {name: torch.ones_like(p, dtype=torch.bool) for name, p in vit.named_parameters()}
    entries, mu = Entries(masks), 3.0
    theta = {name: p.detach().clone() for name, p in vit.named_parameters()}
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    for x, y in batches:
        loss = nn.functional.cross_entropy(vit(x), y)
        moving = [(p, theta[name], masks[name]) for name, p in vit.named_parameters() if name in masks]
        loss = loss + mu / 2 * sum(((p - t)[m] ** 2).sum() for p, t, m in moving)
        for (p, _, m), gradient in zip(moving, torch.autograd.grad(loss, [p for p, *_ in moving]), strict=True):
            p.data -= 0.1 * gradient * m
    expected = entries.gather(named_tensors(vit))
    vit.load_state_dict(theta)
    freeze_all_but(vit, entries)
    optimizer = make_optimizer(vit, entries, rule="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0)
    adjust = proximal(vit, entries, mu)
    train(vit, batches, optimizer, entries, learning_rate=lambda _: 0.1, clip_norm=None, adjust=adjust)
    torch.testing.assert_close(entries.gather(named_tensors(vit)), expected, rtol=1e-4, atol=1e-6)
    for name, tensor in vit.named_parameters():
        frozen = ~masks[name] if name in masks else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[frozen], theta[name][frozen])


def test_fedprox_is_the_published_update(mask):
    task, mu = Quadratics(mask, steps=[1, 9, 2, 3, 4, 7], sizes=(3, 5, 7, 9, 11, 13)), 0.7
    x = task.start.double()
    found = task.rounds(10, fraction=0.5, adjust=lambda _: proximal(task.model, task.entries, mu))
    for number, theirs in enumerate(found, 1):
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


def test_gradients_are_adjusted_before_they_are_clipped(vit, images, labels):
    entries = Entries(half(vit))
    freeze_all_but(vit, entries)
    optimizer = make_optimizer(vit, entries, rule="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    before = entries.gather(named_tensors(vit))
    options = {"learning_rate": lambda _: 1.0, "clip_norm": 0.25, "adjust": lambda gradient: gradient + 100}
    train(vit, [(images, labels)], optimizer, entries, **options)
    assert (entries.gather(named_tensors(vit)) - before).norm() == pytest.approx(0.25, rel=1e-4)
