from itertools import count, takewhile

import pytest
import torch

from fedtalos.data.images import LabelledImages
from fedtalos.errors import BadUpdateError
from fedtalos.metrics import Metrics
from fedtalos.randomness import torch_generator
from fedtalos.training.centralized import train_centralized
from fedtalos.training.engine.step import Stack
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.optimizer_state import optimizer_tensors, restore_optimizer
from fedtalos.training.schedule import Schedule

LOCAL = LocalTraining(batch_size=4, learning_rate=Schedule(1e-3, total=3, warmup=1), augmentation="crop_flip")


@pytest.fixture
def stored(device) -> LabelledImages:
    pixels = torch.randint(0, 256, (18, 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
    return LabelledImages(pixels, torch.arange(18) % 5).to(device)


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


def some_entries(vit):
    """Scattered entries, whole rows, a whole tensor: every form that an optimiser's state has."""
    masks = {"blocks.1.attn.qkv.weight": torch.rand(288, 96, generator=torch_generator(0, "mask")) < 0.1}
    rows = torch.zeros(384, 96, dtype=torch.bool)
    rows[50:60] = True
    return masks | {"blocks.3.mlp.fc1.weight": rows, "head.weight": torch.ones(5, 96, dtype=torch.bool)}


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("chosen", [None, some_entries])
def test_the_engine_trains_as_the_loop_does(vit, stored, rule, chosen, recorded):
    """In float64, for of gradients that are but rounding AdamW makes steps of its full rate."""
    moving = MaskedParameters(vit.double(), chosen and chosen(vit))
    local, theta = LOCAL.but(optimizer=rule), moving.copy()
    found = []
    for way in ("off", "graph"):
        moving.load(theta)
        optimizer = local.optimizer_for(moving)

        def watch(batches, _share):
            return ((images.double(), labels) for images, labels in batches)

        epochs = train_centralized(moving, stored, local=local, epochs=2, optimizer=optimizer, watch=watch, compile=way)
        metrics = [metrics for _, metrics in epochs]
        state = [{name: t.clone() for name, t in entry.items()} for entry in optimizer.state.values()]
        found.append((metrics, moving.vector(), state))
    (loop, theirs, kept), (engine, ours, kept_too) = found
    assert [metrics.correct for metrics in engine] == [metrics.correct for metrics in loop]
    assert [metrics.loss_sum for metrics in engine] == pytest.approx([metrics.loss_sum for metrics in loop], rel=1e-5)
    off = {} if moving.device.type == "cpu" else {"rtol": 1e-6, "atol": 1e-7}  # a graph's learning rate is float32
    torch.testing.assert_close(ours, theirs, **{"rtol": 1e-8, "atol": 1e-10} | off)
    torch.testing.assert_close(kept_too, kept, **{"rtol": 1e-6, "atol": 1e-10} | off)
    assert recorded


@pytest.mark.parametrize(("chosen", "augmentation"), [(None, "crop_flip"), (some_entries, "none")])
def test_float32_on_the_engine_is_within_1e_5_of_the_loop(vit, stored, chosen, augmentation):
    """Under the mask, on kept features of the frozen stages."""
    moving, found = MaskedParameters(vit, chosen and chosen(vit)), []
    local, theta, before = LOCAL.but(optimizer="sgd", augmentation=augmentation), moving.copy(), moving.vector()
    for way in ("off", "graph"):
        moving.load(theta)
        list(train_centralized(moving, stored, local=local, epochs=2, compile=way))
        found.append(moving.vector() - before)
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize("stopped", [2, 5])
def test_the_engine_goes_on_from_where_it_was_stopped(vit, stored, stopped):
    moving = MaskedParameters(vit, some_entries(vit))
    theta, taken, end = moving.copy(), count(), []
    list(train_centralized(moving, stored, local=LOCAL, epochs=2, compile="graph"))
    end = moving.vector()

    moving.load(theta)
    optimizer = LOCAL.optimizer_for(moving)

    def watch(batches, _share):
        return takewhile(lambda _: next(taken) < stopped, batches)

    options = {"local": LOCAL, "epochs": 2, "compile": "graph"}
    number, so_far = list(train_centralized(moving, stored, optimizer=optimizer, watch=watch, **options))[-1]
    if so_far.examples == 18:
        number, so_far = number + 1, Metrics()
    again = LOCAL.optimizer_for(moving)
    restore_optimizer(again, optimizer_tensors(optimizer))
    list(train_centralized(moving, stored, optimizer=again, done=number - 1, so_far=so_far, **options))
    assert torch.equal(moving.vector(), end)


def test_where_memory_ends_the_loop_takes_over_from_the_epoch_s_start(vit, stored, monkeypatch, caplog):
    moving = MaskedParameters(vit)
    theta = moving.copy()
    list(train_centralized(moving, stored, local=LOCAL, epochs=2))
    end = moving.vector()
    moving.load(theta)

    def run_out(stack, batches, *_, **__):
        next(iter(batches))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Stack, "train", run_out)
    list(train_centralized(moving, stored, local=LOCAL, epochs=2, compile="graph"))
    assert torch.equal(moving.vector(), end)
    assert len(caplog.records) == 1


def test_an_epoch_on_the_engine_that_diverges_is_named_and_leaves_the_model(vit, stored):
    before = MaskedParameters(vit).vector()
    local = LOCAL.but(learning_rate=3e38, optimizer="sgd")
    with pytest.raises(BadUpdateError, match="epoch 1: "):
        list(train_centralized(vit, stored, local=local, epochs=1, compile="graph"))
    assert torch.equal(MaskedParameters(vit).vector(), before)
