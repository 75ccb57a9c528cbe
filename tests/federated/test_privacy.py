"""Differential privacy: the noise that was promised, on what moves alone; epsilon against its library and bounds."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from points import Formula, Point, clients_of

from fedtalos.errors import InputError
from fedtalos.training.federated.fedavg import FedAvg, fedavg
from fedtalos.training.federated.privacy import epsilon, noisy_mean
from fedtalos.training.masked_parameters import MaskedParameters

P = 20000


def noisy(seed=0, number=1, clients=4, mask=None):
    """What the noisy mean makes of clients whose mean is 2 everywhere, with z = 3 and S = 0.5."""
    mask = torch.ones(P // 10, 10, dtype=torch.bool) if mask is None else mask
    model = Point(torch.full((P // 10, 10), 2.0))
    mean = noisy_mean(3, clip=0.5, seed=seed)(MaskedParameters(model, {"x": mask}), clients)
    for client in range(clients):
        values = torch.where(mask, 2.0 + (1 if client % 2 else -1), 2.0)
        mean.add([values], 1.0 + 5 * client)
    mean.write(number)
    return model.x.detach()


@pytest.mark.parametrize("clients", [2, 8])
def test_noise_has_the_deviation_z_s_over_n_and_mean_zero(clients):
    noise = noisy(clients=clients) - 2
    deviation = 3 * 0.5 / clients
    assert float(noise.std()) == pytest.approx(deviation, rel=0.03)
    assert abs(float(noise.mean())) < 4 * deviation / P**0.5
    assert float((noise.abs() > deviation).float().mean()) == pytest.approx(0.3173, abs=0.015)  # of a Gaussian


@pytest.mark.parametrize("came", [0, 1, 3, 5, 8])
def test_the_sum_is_divided_by_the_clients_expected_whoever_came(came):
    """Updates of 2 each, 4 clients expected: theta + 2 came / 4, and noise of deviation z S / 4 whatever the number."""
    model = Point(torch.full((P // 10, 10), 3.0))
    mean = noisy_mean(3, clip=0.5)(MaskedParameters(model), 4.0)
    for _ in range(2):  # as good the second time
        for _client in range(came):
            mean.add([torch.full((P // 10, 10), 5.0)], 1.0)
        mean.write(1)
        noise = model.x.detach() - (3 + 2 * came / 4)
        assert float(noise.std()) == pytest.approx(3 * 0.5 / 4, rel=0.03)
        assert abs(float(noise.mean())) < 4 * 0.375 / P**0.5
        with torch.no_grad():
            model.x.fill_(3.0)


def test_a_poisson_round_without_clients_gets_noise_too():
    """Else whoever sees two equal models in a row knows that nobody came."""
    model = Point(torch.zeros(2, 1))
    algorithm = FedAvg(aggregation=noisy_mean(1.0, clip=1.0))
    rounds = fedavg(
        model,
        clients_of([1, 1, 1]),
        local=Formula(lambda *_: None),
        rounds=9,
        fraction=0.2,
        sampling="poisson",
        algorithm=algorithm,
    )
    before, empty = model.x.detach().clone(), 0
    for round_ in rounds:
        assert bool((model.x.detach() != before).all())
        before, empty = model.x.detach().clone(), empty + (not round_.clients)
    assert empty > 1


def test_noise_is_drawn_by_seed_and_round():
    assert torch.equal(noisy(seed=1, number=2), noisy(seed=1, number=2))
    for other in (noisy(seed=2, number=2), noisy(seed=1, number=3)):
        together = np.corrcoef((noisy(seed=1, number=2) - 2).flatten(), (other - 2).flatten())
        assert abs(together[0, 1]) < 0.04


def test_what_does_not_move_gets_no_noise():
    mask = torch.arange(P).view(-1, 10) % 10 == 0
    after = noisy(mask=mask)
    assert torch.equal(after[~mask], torch.full((P // 10, 10), 2.0)[~mask])
    assert bool((after[mask] != 2).all())


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match=r"dp-accounting cannot be imported .* pip install .*'\.\[privacy\]'"):
        epsilon(noise_multiplier=1, delta=1e-5, clients=10, sampled=2, rounds=1)


def test_epsilon_is_the_librarys_for_updates_that_are_replaced():
    dp = pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    from dp_accounting.rdp import RdpAccountant

    account = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    for _ in range(7):
        account.compose(dp.SampledWithoutReplacementDpEvent(500, 20, dp.GaussianDpEvent(0.6)))
    ours = epsilon(noise_multiplier=1.2, delta=1e-6, clients=500, sampled=20, rounds=7)
    assert ours == pytest.approx(account.get_epsilon(1e-6), rel=1e-9)


@pytest.mark.parametrize(("z", "clients", "sampled"), [(2.0, 100, 20), (1.1, 1000, 17.5), (0.7, 50, 50)])
def test_epsilon_of_poisson_sampling_is_the_librarys(z, clients, sampled):
    dp = pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    event = dp.PoissonSampledDpEvent(sampled / clients, dp.GaussianDpEvent(z))
    ours = partial(
        epsilon, noise_multiplier=z, delta=1e-5, clients=clients, sampled=sampled, rounds=5, sampling="poisson"
    )
    account = RdpAccountant().compose(event, 5)  # adding or removing one is its own relation
    assert ours() == ours(adjacency="add or remove one client") == pytest.approx(account.get_epsilon(1e-5), rel=1e-9)
    account = PLDAccountant(dp.NeighboringRelation.REPLACE_ONE).compose(event, 5)
    replaced = ours(adjacency="replace one client")
    assert replaced == pytest.approx(account.get_epsilon(1e-5), rel=1e-9)


def test_poisson_sampling_takes_the_issues_5_7_to_1_4():
    pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    issue = {"noise_multiplier": 2.0, "delta": 1e-5, "clients": 100, "sampled": 20, "rounds": 5}
    assert epsilon(**issue) == pytest.approx(5.73, abs=0.01)
    assert epsilon(**issue, sampling="poisson") == pytest.approx(1.41, abs=0.01)
    assert epsilon(**issue, sampling="poisson", adjacency="replace one client") == pytest.approx(1.84, abs=0.01)
    with pytest.raises(InputError, match="needs sampling poisson"):
        epsilon(**issue, adjacency="add or remove one client")


@pytest.mark.parametrize(("z", "q"), [(1.0, 0.2), (2.0, 0.1), (0.8, 0.5)])
def test_epsilon_of_one_poisson_round_is_within_what_the_densities_themselves_say(z, q):
    """delta(epsilon) of the two worst neighbours, whose update is S or not there (or -S), integrated on a grid."""
    pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    x = np.linspace(-40 * z, 40 * z, 400_001)

    def mixture(centre):
        def density(mean):
            return np.exp(-((x - mean) ** 2) / (2 * z * z)) / (z * math.sqrt(2 * math.pi))

        return (1 - q) * density(0) + q * density(centre)

    def worst(pairs, eps):
        return max(np.maximum(a - math.exp(eps) * b, 0).sum() * (x[1] - x[0]) for a, b in pairs)

    there, nobody, other = mixture(1), mixture(0), mixture(-1)
    for adjacency, pairs, slack in (
        ("add or remove one client", [(there, nobody), (nobody, there)], 1.6),
        ("replace one client", [(there, other)], 1.01),
    ):
        found = epsilon(
            noise_multiplier=z,
            delta=1e-4,
            clients=10,
            sampled=10 * q,
            rounds=1,
            sampling="poisson",
            adjacency=adjacency,
        )
        assert worst(pairs, found) <= 1e-4 * (1 + 1e-6)  # it holds
        assert worst(pairs, found / slack) > 1e-4  # and is not much more than need be


@pytest.mark.parametrize(("z", "rounds", "delta"), [(8.0, 1, 1e-5), (20.0, 10, 1e-5), (40.0, 100, 1e-6)])
def test_with_all_clients_epsilon_is_within_the_published_bound_of_gaussian_noise(z, rounds, delta):
    """Mironov, 2017: min over alpha of alpha rho + log(1/delta) / (alpha - 1), rho = T / (2 (z/2)^2)."""
    pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    rho = rounds / (2 * (z / 2) ** 2)
    bound = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    found = epsilon(noise_multiplier=z, delta=delta, clients=50, sampled=50, rounds=rounds)
    assert 0.7 * bound < found < bound


def test_epsilon_falls_with_noise_and_clients_and_grows_with_rounds():
    pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    base = {"noise_multiplier": 2.0, "delta": 1e-5, "clients": 200, "sampled": 10, "rounds": 20}
    middle = epsilon(**base)
    assert epsilon(**base | {"noise_multiplier": 3.0}) < middle < epsilon(**base | {"rounds": 40})
    assert epsilon(**base | {"clients": 400}) < middle < epsilon(**base | {"sampled": 20})
