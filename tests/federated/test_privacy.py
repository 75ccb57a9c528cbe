"""Differential privacy: the noise that was promised, on what moves alone; epsilon against its library and bounds."""

import math
import sys

import numpy as np
import pytest
import torch
from points import Point

from fedtalos.errors import InputError
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
