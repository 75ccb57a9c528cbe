"""Rules against their published definitions in plain numpy, and against attackers, on vectors and quadratics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points import Formula, Point, clients_of

from fedtalos.errors import BadUpdateError, TrainingError
from fedtalos.metrics import Metrics
from fedtalos.training.entries import Values
from fedtalos.training.federated import aggregation
from fedtalos.training.federated.aggregation import (
    RULES,
    TooFewError,
    WeightedMean,
    krum,
    median,
    multi_krum,
    robust,
    trimmed_mean,
)
from fedtalos.training.federated.fedavg import FedAvg, Update, fedavg
from fedtalos.training.federated.transforms import FACTORS, attacked, clipped
from fedtalos.training.masked_parameters import MaskedParameters

N, F, P = 9, 3, 8
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


class Pulling:
    """Client k pulls x half-way to its own minimum; minima lie close together, the start far off."""

    def __init__(self, attack=None, *, clip=None, rule=None, mask=MASK):
        draw = torch.Generator().manual_seed(0)
        self.minima = 0.1 * torch.randn(N, P, generator=draw)
        self.model, self.mask = Point(torch.full((P,), 5.0)), mask
        self.through = [] if attack is None else [attacked(attack, range(N - F, N))]
        self.through += [] if clip is None else [clipped(clip)]
        self.aggregation = WeightedMean if rule is None else robust(RULES.get(rule, rule), byzantine=F)

    def update(self, client, _adjust):
        x = self.model.x.detach()
        x[self.mask] += 0.5 * (self.minima[client] - x)[self.mask]

    def after(self, rounds=20):
        going = fedavg(
            self.model,
            clients_of([1] * N),
            {"x": self.mask},
            local=Formula(self.update),
            rounds=rounds,
            fraction=1.0,
            algorithm=FedAvg(aggregation=self.aggregation),
            through=self.through,
        )
        for _ in going:
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
    assert Pulling(attack, rule=rule).distance() < 1


def test_with_f_attackers_the_mean_does_not():
    assert Pulling("scaled").distance(3) > 1000
    with pytest.raises(BadUpdateError, match="the update is not finite"):
        Pulling("nan", mask=torch.ones(P, dtype=torch.bool)).after(1)


@pytest.mark.parametrize("rule", RULES)
def test_without_attackers_every_rule_comes_close_to_the_mean(rule):
    assert Pulling(rule=rule).distance() < 1
    assert Pulling().distance() < 1


def test_clipping_bounds_what_attackers_can_do_in_a_round():
    before = torch.full((P,), 5.0)
    moved = (Pulling("scaled", clip=0.5).after(1) - before).norm()
    assert moved <= 0.5 + 1e-5


def test_rules_see_a_row_of_what_moves_for_every_client():
    seen = []
    clients = Pulling(rule=lambda values, f: seen.append(values.clone()) or values[0])
    clients.after(1)
    start = torch.full((N, P), 5.0)
    torch.testing.assert_close(seen[0], (start + 0.5 * (clients.minima - start))[:, MASK])


def test_clipped_updates_keep_their_direction_and_short_ones_their_bits():
    theta = Values([torch.arange(6.0).view(2, 3), torch.ones(2)])
    draw = torch.Generator().manual_seed(0)
    sent = [theta.vector + 0.3 * k * torch.randn(8, generator=draw) for k in range(5)]

    def updates(_number, clients, theta):
        for client in clients:
            yield client, Update([sent[client][:6].view(2, 3).clone(), sent[client][6:].clone()], Metrics())

    norms = []
    plain, short = updates(1, range(5), theta), clipped(1.0)(updates)(1, range(5), theta)
    for (client, before), (same_client, after) in zip(plain, short, strict=True):
        assert client == same_client
        u, v = (
            torch.cat([(p - t).flatten() for p, t in zip(x.values, theta.parts, strict=True)]) for x in (before, after)
        )
        norms.append(float(u.norm()))
        if norms[-1] <= 1:
            assert all(torch.equal(a, b) for a, b in zip(before.values, after.values, strict=True))
        else:
            assert float(v.norm()) == pytest.approx(1, abs=1e-5)
            torch.testing.assert_close(v, u / u.norm(), rtol=1e-4, atol=1e-5)
    assert min(norms) <= 1 < max(norms)


@pytest.mark.parametrize("rule", [None, "median"])
@pytest.mark.parametrize(
    "wrong", [lambda p: [p[0][:-1]], lambda p: [p[0][:1]], lambda p: [*p, p[0]], lambda p: [], lambda p: [p[0][None]]]
)
def test_values_of_another_length_end_the_round_and_leave_theta(wrong, rule):
    clients = Pulling(rule=rule, mask=torch.ones(P, dtype=torch.bool))

    def misshapen(updates):
        def changed(*arguments):
            for client, update in updates(*arguments):
                yield client, replace(update, values=wrong(update.values)) if client == 4 else update

        return changed

    clients.through = [misshapen]
    with pytest.raises(TrainingError, match="round 1, client 4: expected 8 values in 1 tensors"):
        clients.after(1)
    assert torch.equal(clients.model.x.detach(), torch.full((P,), 5.0))


def test_too_few_finite_clients_end_the_round_and_leave_theta():
    clients = Pulling("nan", rule="krum")
    clients.through += [attacked("nan", range(4))]
    expected = "round 1: 7 of 9 clients sent no finite numbers; krum against 0 attackers needs over 2 clients"
    with pytest.raises(TrainingError, match=expected):
        clients.after(1)
    assert torch.equal(clients.model.x.detach(), torch.full((P,), 5.0))


def test_the_mean_is_weighted_and_starts_anew_each_round():
    model = Point(torch.zeros(2))
    mean = WeightedMean(MaskedParameters(model), 2)
    for _ in range(2):
        mean.add([torch.tensor([1.0, 2.0])], 1)
        mean.add([torch.tensor([5.0, 6.0])], 3)
        mean.write(1)
        assert model.x.detach().tolist() == [4.0, 5.0]
