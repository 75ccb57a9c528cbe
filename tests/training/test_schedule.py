import math

import numpy as np
import pytest
import torch

from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.training import local_training
from fedtalos.training.centralized import train_centralized
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.schedule import Schedule


def test_schedules():
    options = {"warmup": 2, "step_every": 3, "step_gamma": 0.1}
    cosine = Schedule(1.0, 10, "cosine", **options)
    assert [cosine(0), cosine(1), cosine(2), cosine(6), cosine(10)] == pytest.approx([1 / 4, 3 / 4, 1.0, 0.5, 0.0])
    assert Schedule(0.3, 10, "constant", **options)(7) == 0.3
    step = Schedule(1.0, 10, "step", **options)
    assert [step(2), step(3), step(6.5)] == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize("final", [0.01, 0.1, 1.0])
def test_cosine_ends_at_a_share_of_the_peak(final):
    rate = Schedule(2.0, 100, "cosine", warmup=4, final=final)
    assert [rate(4), rate(52), rate(100)] == pytest.approx([2.0, 1.0 + final, 2.0 * final])
    assert min(rate(done) for done in range(4, 100)) >= 2.0 * final
    assert Schedule(2.0, 100, "constant", final=final)(99) == 2.0


def test_a_cosine_to_zero_has_the_bits_that_it_had():
    rate = Schedule(3e-3, 37, "cosine")
    for done in np.linspace(0, 37, 200).tolist():
        assert rate(done) == 3e-3 * 0.5 * (1 + math.cos(math.pi * done / 37))


@pytest.mark.parametrize("warmup", [1, 3, 7])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_the_warm_up_is_a_line_from_zero_to_the_peak(warmup, steps):
    """Whole rounds, or steps of an epoch: every rate is the line's mean over what it is held for."""
    rate = Schedule(1.0, 20, "cosine", warmup=warmup)
    found = [rate(number / steps, 1 / steps) for number in range(warmup * steps + 1)]
    assert np.diff(found[:-1]) == pytest.approx(1 / (warmup * steps))
    assert found[0] == pytest.approx(0.5 / (warmup * steps)) == 1 - found[-2]
    assert found[-1] == 1.0
    assert np.mean(found[:-1]) == pytest.approx(0.5)


def test_a_warm_up_of_one_epoch_begins_at_next_to_nothing(vit, monkeypatch):
    rates = []

    def train(_moving, batches, _optimizer, *, learning_rate, **_):
        rates.extend(learning_rate(number) for number, _ in enumerate(batches))
        return local_training.Metrics(1.0, 1, 40)

    monkeypatch.setattr(local_training, "train", train)
    images = LabelledImages(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.arange(40) % 5)
    local = LocalTraining(batch_size=2, learning_rate=Schedule(1.0, 2, "constant", warmup=1))
    list(train_centralized(vit, images, local=local, epochs=2))
    assert rates == pytest.approx([*(np.arange(20) + 0.5) / 20, *[1.0] * 20])


@pytest.mark.parametrize("final", [-0.1, 1.1, float("nan")])
def test_a_final_rate_beyond_the_peak_is_refused(final):
    with pytest.raises(InputError, match=r"final .*: expected a share of the peak"):
        Schedule(1.0, 10, final=final)
