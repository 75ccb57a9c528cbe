from itertools import count, takewhile

import pytest
import torch

from fedtalos.data.images import LabelledImages
from fedtalos.errors import BadUpdateError
from fedtalos.metrics import Metrics
from fedtalos.randomness import torch_generator
from fedtalos.training.centralized import train_centralized
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.schedule import Schedule

LOCAL = LocalTraining(batch_size=4, learning_rate=Schedule(1e-3, total=3, warmup=1), augmentation="crop_flip")


@pytest.fixture
def stored() -> LabelledImages:
    pixels = torch.randint(0, 256, (18, 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
    return LabelledImages(pixels, torch.arange(18) % 5)


def test_every_epoch_is_one_pass_at_the_schedules_rate(vit, stored):
    moving = MaskedParameters(vit)
    optimizer, rates = LOCAL.optimizer_for(moving), []

    def watch(batches, _share):
        for batch in batches:
            yield batch
            rates.append(optimizer.param_groups[0]["lr"])

    found = list(train_centralized(moving, stored, local=LOCAL, epochs=3, optimizer=optimizer, watch=watch))
    assert [number for number, _ in found] == [1, 2, 3]
    assert [metrics.examples for _, metrics in found] == [18] * 3
    assert rates == pytest.approx([LOCAL.rate(step / 5, 1 / 5) for step in range(15)])


@pytest.mark.parametrize("stopped", [2, 5, 7])
def test_what_is_stopped_within_an_epoch_goes_on_to_the_same_end(vit, stored, stopped):
    moving = MaskedParameters(vit)
    theta = moving.copy()
    expected = list(train_centralized(moving, stored, local=LOCAL, epochs=3))
    end = moving.vector()

    moving.load(theta)
    optimizer, taken = LOCAL.optimizer_for(moving), count()

    def watch(batches, _share):
        return takewhile(lambda _: next(taken) < stopped, batches)

    begun = list(train_centralized(moving, stored, local=LOCAL, epochs=3, optimizer=optimizer, watch=watch))
    number, so_far = begun[-1]
    if so_far.examples == 18:  # at the end of an epoch
        number, so_far = number + 1, Metrics()
    rest = list(
        train_centralized(moving, stored, local=LOCAL, epochs=3, optimizer=optimizer, done=number - 1, so_far=so_far)
    )
    assert torch.equal(moving.vector(), end)
    assert rest == expected[number - 1 :]


def test_an_epoch_that_diverges_is_named(vit, stored):
    local = LOCAL.but(learning_rate=3e38, optimizer="sgd")
    with pytest.raises(BadUpdateError, match="epoch 1: "):
        list(train_centralized(vit, stored, local=local, epochs=1))


@pytest.mark.parametrize(("name", "source"), [("head.weight", "trained"), ("norm.weight", "random")])
def test_a_head_that_has_been_trained_is_noted(vit, name, source):
    images = LabelledImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
    mask = {name: torch.ones_like(vit.get_parameter(name), dtype=torch.bool)}
    epochs = train_centralized(vit, images, mask, local=LocalTraining(batch_size=2), epochs=1)
    assert vit.head_source == "random"
    next(epochs)
    assert vit.head_source == source
