import math
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from fedtalos.data.batches import batch_positions
from fedtalos.data.images import LabelledImages
from fedtalos.errors import BadUpdateError, InputError
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.feature_cache import view_of
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters, head_mask
from fedtalos.training.schedule import Schedule


@pytest.fixture
def stored(device) -> LabelledImages:
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
    return LabelledImages(pixels, torch.arange(20) % 5).to(device)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_has_the_bits_of_a_plain_torch_loop(vit, stored, rule, clip_norm):
    ids, start = np.array([2, 3, 5, 7, 11, 13, 17]), {n: p.detach().clone() for n, p in vit.named_parameters()}
    if rule == "sgd":
        optimizer = torch.optim.SGD(vit.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    else:
        fused = vit.pos_embed.device.type == "cuda"
        optimizer = torch.optim.AdamW(vit.parameters(), lr=0.05, weight_decay=0.01, fused=fused)
    loss_sum = 0.0
    for positions in islice(batch_positions(len(ids), 4, generator(0, "batches")), 5):
        x, y = view_of(vit)(stored.pixels[ids[positions]]), stored.labels[ids[positions]]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(vit(x), y)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(vit.parameters(), clip_norm)
        optimizer.step()
        loss_sum += loss.item() * len(y)
    expected = {name: p.detach().clone() for name, p in vit.named_parameters()}

    vit.load_state_dict(start)
    local = LocalTraining(steps=5, batch_size=4, optimizer=rule, learning_rate=0.05, clip_norm=clip_norm)
    metrics = local.run(MaskedParameters(vit), stored, ids, generator(0, "batches"))
    assert (metrics.loss_sum, metrics.examples) == (loss_sum, 4 + 3 + 4 + 3 + 4)
    assert all(torch.equal(p, expected[name]) for name, p in vit.named_parameters())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 0}, "steps 0: expected at least 1"),
        ({"epochs": 0}, "epochs 0: expected at least 1"),
        ({"batch_size": -1}, "batch_size -1: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate 0.0: expected a number above 0"),
        ({"learning_rate": -1e-3}, "learning_rate -0.001"),
        ({"learning_rate": math.nan}, "learning_rate nan"),
        ({"learning_rate": math.inf}, "learning_rate inf"),
        ({"clip_norm": 0}, "clip_norm 0: expected a number above 0"),
    ],
)
def test_values_outside_their_limits_are_refused(values, says):
    with pytest.raises(InputError, match=says):
        LocalTraining(**values)
    with pytest.raises(InputError, match=says):
        LocalTraining().but(**values)


def test_steps_are_as_given_or_as_many_as_passes_take():
    assert LocalTraining(steps=3, batch_size=4).steps_for(100) == 3
    assert LocalTraining(steps=3, epochs=2, batch_size=4).steps_for(10) == 6
    assert LocalTraining(epochs=1, batch_size=4).steps_for(3) == 1


def test_the_rate_is_a_number_or_a_schedules():
    assert LocalTraining(learning_rate=0.3).rate(7) == 0.3
    assert LocalTraining(learning_rate=Schedule(1.0, 10)).rate(5) == pytest.approx(0.5)


def test_each_run_begins_with_a_fresh_optimiser(vit, stored):
    moving, ids = MaskedParameters(vit), np.arange(8)
    local = LocalTraining(steps=2, batch_size=4, optimizer="sgd", learning_rate=0.1)
    theta, found = moving.copy(), []
    for _ in range(2):
        moving.load(theta)
        local.run(moving, stored, ids, generator(0, "batches"))
        found.append(moving.vector())
    assert torch.equal(*found)


def test_a_run_that_goes_on_within_ends_at_the_same_bits(vit, stored):
    moving, ids = MaskedParameters(vit), np.arange(20)
    local = LocalTraining(epochs=1, batch_size=4, learning_rate=0.01, augmentation="crop_flip")
    theta = moving.copy()
    rate = lambda step: 0.01 / (1 + step)  # noqa: E731
    local.run(moving, stored, ids, generator(0, "batches"), learning_rate=rate)
    expected = moving.vector()

    moving.load(theta)
    optimizer = local.optimizer_for(moving)

    def two(batches, _share):
        return islice(batches, 2)

    local.run(moving, stored, ids, generator(0, "batches"), learning_rate=rate, optimizer=optimizer, watch=two)
    assert not torch.equal(moving.vector(), expected)
    rest = local.run(
        moving,
        stored,
        ids,
        generator(0, "batches"),
        learning_rate=lambda step: rate(step + 2),
        optimizer=optimizer,
        first=2,
    )
    assert rest.examples == 12
    assert torch.equal(moving.vector(), expected)


def test_batches_are_watched_each_as_its_share_of_a_round(vit, stored):
    seen = []

    def watch(batches, share):
        for batch in batches:
            seen.append(share)
            yield batch

    local = LocalTraining(steps=4, batch_size=4)
    local.run(MaskedParameters(vit), stored, np.arange(8), generator(0, "batches"), watch=watch, share=0.5)
    assert seen == [0.125] * 4


@pytest.mark.parametrize("augmentation", ["none", "crop"])
def test_kept_features_are_used_where_images_are_not_augmented(vit, stored, augmentation):
    seen = []
    vit.patch_embed.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    local = LocalTraining(steps=6, batch_size=4, augmentation=augmentation)
    local.run(MaskedParameters(vit, head_mask(vit)), stored, np.arange(8), generator(0, "batches"))
    assert seen == ([1, 8] if augmentation == "none" else [4] * 6)


def test_training_that_diverges_says_where(vit, stored):
    local = LocalTraining(steps=2, batch_size=4, optimizer="sgd", learning_rate=3e38)
    with pytest.raises(BadUpdateError, match=r"local step \d, learning rate 3e\+38"):
        local.run(MaskedParameters(vit), stored, np.arange(8), generator(0, "batches"))
