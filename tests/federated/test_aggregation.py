"""Rules against their published definitions in plain numpy, and against attackers, on vectors and quadratics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedtalos.metrics import Metrics
from fedtalos.training.federated import aggregation
from fedtalos.training.federated.aggregation import (
    Robust,
    TooFewError,
    WeightedMean,
    krum,
    median,
    multi_krum,
    trimmed_mean,
)
from fedtalos.training.federated.fedavg import fedavg, one_by_one
from fedtalos.training.federated.transforms import FACTORS, attacked, clipped
from fedtalos.training.loop import BadUpdateError, TrainingError
from fedtalos.training.masked_parameters import Entries, Values

N, F, P = 9, 3, 8
RULES = {"median": median, "trimmed_mean": trimmed_mean, "krum": krum, "multi_krum": multi_krum}
MASK = torch.tensor([True, False, True, True, False, False, True, False])


@st.composite
def matrices(draw):
    """(N, A) of small integers, where sums are exact and ties are common, or of normal draws."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 9)))
    source = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = source.integers(-3, 4, shape) if draw(st.booleans()) else source.normal(size=shape)
    return torch.tensor(values, dtype=torch.float32), draw(st.integers(0, 5))


@given(matrices())
@settings(max_examples=100, deadline=None)
def test_median_and_trimmed_mean_are_numpys(case):
    values, f = case
    torch.testing.assert_close(median(values).numpy(), np.median(values.numpy(), 0))
    if len(values) > 2 * f:
        expected = np.sort(values.numpy(), 0)[f : len(values) - f].mean(0)
        torch.testing.assert_close(trimmed_mean(values, f).numpy(), expected)
    else:
        with pytest.raises(TooFewError, match=f"over {2 * f} clients in a round, got {len(values)}"):
            trimmed_mean(values, f)


def krum_scores(values, f):
    """Blanchard et al., 2017, section 4, word for word."""
    scores = []
    for i, mine in enumerate(values):
        distances = sorted(float(((mine - other) ** 2).sum()) for j, other in enumerate(values) if j != i)
        scores.append(sum(distances[: len(values) - f - 2]))
    return scores


@given(matrices())
@settings(max_examples=100, deadline=None)
def test_krum_takes_the_clients_of_the_lowest_scores(case):
    values, f = case
    n = len(values)
    if n <= 2 * f + 2:
        with pytest.raises(TooFewError, match=f"over {2 * f + 2} clients"):
            krum(values, f)
        return
    scores = krum_scores(values.double().numpy(), f)
    found = krum(values, f)
    equal = [score for score, row in zip(scores, values, strict=True) if torch.equal(row, found)]
    assert min(equal) == pytest.approx(min(scores), rel=1e-5, abs=1e-6)  # of nearly equal scores either may be taken
    ranked = sorted(scores)
    if n - f < n and ranked[n - f] - ranked[n - f - 1] > 1e-4:
        best = [row for score, row in zip(scores, values, strict=True) if score <= ranked[n - f - 1]]
        torch.testing.assert_close(multi_krum(values, f), torch.stack(best).mean(0))


@given(matrices(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_clients_order_does_not_count(case, random):
    values, _ = case
    order = random.sample(range(len(values)), len(values))
    assert torch.equal(median(values[order]), median(values))
    if len(values) > 2:
        torch.testing.assert_close(trimmed_mean(values[order], 1), trimmed_mean(values, 1))
    distinct = torch.randn(N, 5, generator=torch.Generator().manual_seed(len(values)))
    shuffled = distinct[random.sample(range(N), N)]
    assert torch.equal(krum(shuffled, F), krum(distinct, F))
    torch.testing.assert_close(multi_krum(shuffled, F), multi_krum(distinct, F))


def test_columns_are_sorted_in_pieces(monkeypatch):
    values = torch.randn(5, 10)
    whole = median(values)
    monkeypatch.setattr(aggregation, "COLUMNS_AT_ONCE", 3)
    assert torch.equal(median(values), whole)


def test_small_differences_of_large_values_count():
    values = 1000 + torch.tensor([[0.0], [0.01], [0.02], [0.03], [0.5]]).expand(5, 40)
    chosen = {float(row[0]) for row in [krum(torch.roll(values, shift, 0), 1) for shift in range(5)]}
    assert chosen <= {float(values[1, 0]), float(values[2, 0])}


class Clients:
    """Client k pulls x half-way to its own minimum; minima lie close together, the start far off."""

    def __init__(self, attack=None, *, clip=None, rule=None, mask=MASK):
        draw = torch.Generator().manual_seed(0)
        self.minima = 0.1 * torch.randn(N, P, generator=draw)
        self.model = nn.Module()
        self.model.x = nn.Parameter(torch.full((P,), 5.0))
        self.entries, self.mask = Entries({"x": mask}), mask
        clients = one_by_one(self.model, self.entries, self.update)
        if attack is not None:
            clients = attacked(clients, attack, range(N - F, N))
        self.train_clients = clients if clip is None else clipped(clients, clip)
        self.rule = None if rule is None else Robust(self.model, self.entries, RULES[rule], clients=N, byzantine=F)

    def update(self, _number, client):
        x = self.model.x.detach()
        x[self.mask] += 0.5 * (self.minima[client] - x)[self.mask]
        return Metrics(1.0, 1, 1)

    def after(self, rounds=20):
        options = {"fraction": 1.0, "rounds": rounds, "seed": 0, "aggregation": self.rule}
        for _ in fedavg(self.model, self.entries, self.train_clients, np.ones(N), **options):
            assert torch.equal(self.model.x.detach()[~self.mask], torch.full((P,), 5.0)[~self.mask])
        return self.model.x.detach()

    def distance(self, rounds=20):
        """From the minimum of the honest, as a multiple of how far the honest lie apart."""
        honest = self.minima[: N - F, self.mask]
        spread = (honest - honest.mean(0)).norm(dim=1).max()
        return float((self.after(rounds)[self.mask] - honest.mean(0)).norm() / spread)


@pytest.mark.parametrize("attack", FACTORS)
@pytest.mark.parametrize("rule", RULES)
def test_with_f_attackers_every_rule_stays_among_the_honest(attack, rule):
    assert Clients(attack, rule=rule).distance() < 1


def test_with_f_attackers_the_mean_does_not():
    assert Clients("scaled").distance(3) > 1000
    with pytest.raises(BadUpdateError, match="the update is not finite"):
        Clients("nan", mask=torch.ones(P, dtype=torch.bool)).after(1)


@pytest.mark.parametrize("rule", RULES)
def test_without_attackers_every_rule_comes_close_to_the_mean(rule):
    assert Clients(rule=rule).distance() < 1
    assert Clients().distance() < 1


def test_clipping_bounds_what_attackers_can_do_in_a_round():
    before = torch.full((P,), 5.0)
    moved = (Clients("scaled", clip=0.5).after(1) - before).norm()
    assert moved <= 0.5 + 1e-5


def test_rules_see_a_row_of_what_moves_for_every_client():
    seen = []
    clients = Clients()
    watch = Robust(
        clients.model,
        clients.entries,
        lambda values, f: seen.append(values.clone()) or values[0],
        clients=N,
        byzantine=F,
    )
    clients.rule = watch
    clients.after(1)
    start = torch.full((N, P), 5.0)
    torch.testing.assert_close(seen[0], (start + 0.5 * (clients.minima - start))[:, MASK])


def test_clipped_updates_keep_their_direction_and_short_ones_their_bits():
    theta = Values([torch.arange(6.0).view(2, 3), torch.ones(2)])
    draw = torch.Generator().manual_seed(0)
    updates = [0.3 * k * torch.randn(8, generator=draw) for k in range(5)]

    def train(_number, clients, theta):
        for client in clients:
            sent = theta.vector + updates[client]
            yield Metrics(), [sent[:6].view(2, 3).clone(), sent[6:].clone()]

    norms = []
    plain, short = train(1, range(5), theta), clipped(train, 1.0)(1, range(5), theta)
    for (_, before), (_, after) in zip(plain, short, strict=True):
        u, v = (torch.cat([(p - t).flatten() for p, t in zip(x, theta.parts, strict=True)]) for x in (before, after))
        norms.append(float(u.norm()))
        if norms[-1] <= 1:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        else:
            assert float(v.norm()) == pytest.approx(1, abs=1e-5)
            torch.testing.assert_close(v, u / u.norm(), rtol=1e-4, atol=1e-5)
    assert min(norms) <= 1 < max(norms)


@pytest.mark.parametrize("rule", [None, "median"])
@pytest.mark.parametrize(
    "wrong", [lambda p: [p[0][:-1]], lambda p: [p[0][:1]], lambda p: [*p, p[0]], lambda p: [], lambda p: [p[0][None]]]
)
def test_values_of_another_length_end_the_round_and_leave_theta(wrong, rule):
    clients = Clients(rule=rule, mask=torch.ones(P, dtype=torch.bool))
    right = clients.train_clients
    clients.train_clients = lambda *args: ((m, wrong(v) if c == 4 else v) for c, (m, v) in enumerate(right(*args)))
    with pytest.raises(TrainingError, match="round 1, client 4: expected 8 values in 1 tensors"):
        clients.after(1)
    assert torch.equal(clients.model.x.detach(), torch.full((P,), 5.0))


def test_too_few_finite_clients_end_the_round_and_leave_theta():
    clients = Clients("nan", rule="krum")
    clients.train_clients = attacked(clients.train_clients, "nan", range(4))
    expected = "round 1: 7 of 9 clients sent no finite numbers; krum against 0 attackers needs over 2 clients"
    with pytest.raises(TrainingError, match=expected):
        clients.after(1)
    assert torch.equal(clients.model.x.detach(), torch.full((P,), 5.0))


def test_the_mean_is_weighted_and_starts_anew_each_round():
    model = nn.Module()
    model.x = nn.Parameter(torch.zeros(2))
    mean = WeightedMean(model, Entries({"x": torch.ones(2, dtype=torch.bool)}))
    for _ in range(2):
        mean.add([torch.tensor([1.0, 2.0])], 1)
        mean.add([torch.tensor([5.0, 6.0])], 3)
        mean.write(1)
        assert model.x.detach().tolist() == [4.0, 5.0]
