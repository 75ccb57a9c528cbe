import copy
import math
from functools import partial
from itertools import islice

import pytest
import torch

from fedtalos.app.grouping import seconds_a_step
from fedtalos.data.batches import View, batch_positions, batch_sizes, stacked_batches, training_batches
from fedtalos.data.images import LabelledImages
from fedtalos.models.vision_transformer import Attention
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.federated.fedavg import fedavg, one_by_one
from fedtalos.training.federated.stacked import in_groups, together
from fedtalos.training.loop import BadUpdateError, freeze_all_but, make_optimizer, train
from fedtalos.training.masked_parameters import Entries, Values, named_tensors

SIZES = [6, 6, 4, 6, 6, 6, 3]  # neighbours 0 1 and 3 4 5 have equal plans, 2 and 6 none
STEPS, BATCH = 2, 4  # of 6 images: a whole batch and a ragged one


def dense(vit):
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in vit.named_parameters()}


def masked(vit):
    """A tenth of q and k, few rows of fc1, a bias: frozen tensors, frozen rows, frozen entries; and a new head."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool, requires_grad=False) for name, p in vit.named_parameters()}
    for name in ("blocks.1.attn.qkv.weight", "blocks.4.attn.qkv.weight"):
        qk = masks[name][:192]
        qk.copy_(torch.rand(qk.shape, generator=torch_generator(0, "mask")) < 0.1)
    masks["blocks.3.mlp.fc1.weight"][[1, 50, 200]] = True
    masks["blocks.3.attn.proj.bias"][:] = True
    masks["head.weight"][:] = True
    return masks


def head(vit):
    return {name: mask for name, mask in dense(vit).items() if name.startswith("head.")}


class Clients:
    """Both ways to train the same clients of the same model, in float64 so that only roundings of 1e-16 differ."""

    def __init__(self, vit, masks, rule="adamw", clip_norm=0.5, precision="fp32", size=3):
        self.vit = vit.double() if precision == "fp32" else vit
        self.entries = Entries(masks)
        pixels = torch.randint(0, 256, (sum(SIZES), 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
        self.images = LabelledImages(pixels, torch.arange(len(pixels)) % 5)
        self.indices = list(torch.arange(len(pixels)).split(SIZES))
        freeze_all_but(vit, self.entries)
        options = {"rule": rule, "learning_rate": 1.0, "momentum": 0.9, "weight_decay": 0.1}
        optimizer = make_optimizer(vit, self.entries, **options)
        shared = {"clip_norm": clip_norm, "precision": precision}

        def update(number, client):
            optimizer.state.clear()
            batches = [(images[0], labels[0]) for images, labels in self.batches(number, [client])]
            rate = self.rate(number)
            return train(vit, batches, optimizer, self.entries, learning_rate=lambda _: rate, **shared)

        self.alone = one_by_one(vit, self.entries, update)
        optimizer_of = partial(make_optimizer, **options)
        stacked = together(vit, self.entries, self.batches, optimizer_of, learning_rate=self.rate, **shared)
        self.sizes_seen, self.spoilt = [], None

        def watched(number, clients, theta):
            self.sizes_seen.append(len(clients))
            return stacked(number, clients, theta)

        self.grouped = in_groups(self.alone, watched, size, lambda client: batch_sizes(SIZES[client], BATCH, STEPS))

    def rate(self, number):
        return 0.01 / number

    def batches(self, number, group):
        options = {"steps": STEPS, "batch_size": BATCH, "augmentation": "crop_flip"}
        rngs = [generator(0, "batches", number, client) for client in group]
        indices = [self.indices[client].numpy() for client in group]
        view = View(8, (0.5,) * 3, (0.25,) * 3)
        for step, (images, labels) in enumerate(stacked_batches(self.images, indices, view, rngs=rngs, **options)):
            if self.spoilt in group and step == 1:
                images[group.index(self.spoilt)] *= math.inf
            yield images.to(self.vit.pos_embed.dtype), labels

    def train(self, train_clients, clients=range(7), number=1):
        """Metrics and values (A,) of every client."""
        theta = Values(self.entries.moving_rows(named_tensors(self.vit)))
        start = theta.vector.clone()
        found = []
        for metrics, values in train_clients(number, list(clients), theta):
            found.append((metrics, torch.cat([part.flatten() for part in values])))
        torch._foreach_copy_(self.entries.moving_rows(named_tensors(self.vit)), theta.parts)
        assert torch.equal(theta.vector, start)
        return found


@pytest.mark.parametrize("moves", [dense, masked, head])
@pytest.mark.parametrize(("rule", "clip_norm"), [("adamw", 0.5), ("sgd", None), ("sgd", 0.5)])
def test_equals_one_by_one_up_to_rounding(vit, moves, rule, clip_norm):
    clients = Clients(vit, moves(vit), rule, clip_norm)
    for number in (1, 2):  # the second round finds the first one's stacks
        expected, found = (clients.train(way, number=number) for way in (clients.alone, clients.grouped))
        for (metrics, values), (metrics_found, values_found) in zip(expected, found, strict=True):
            assert (metrics_found.correct, metrics_found.examples) == (metrics.correct, metrics.examples)
            assert metrics_found.loss_sum == pytest.approx(metrics.loss_sum, rel=1e-5)
            torch.testing.assert_close(values_found, values, rtol=1e-5, atol=1e-7)
    assert clients.sizes_seen == [2, 3] * 2


def test_frozen_entries_keep_their_bits_and_moving_ones_do_not(vit):
    masks = masked(vit)
    clients = Clients(vit, masks)
    rows = {name: mask for name, mask in masks.items() if mask.any()}
    chosen = torch.cat([part.flatten() for part in clients.entries.moving_rows(rows)])
    start = torch.cat([part.flatten() for part in clients.entries.moving_rows(named_tensors(vit))])
    for _, values in clients.train(clients.grouped, [0, 1]):
        assert torch.equal(values[~chosen], start[~chosen])
        assert (values[chosen] != start[chosen]).double().mean() > 0.99


def test_bf16_is_near_one_by_one_and_weights_stay_float32(vit):
    clients = Clients(vit, dense(vit), precision="bf16")
    expected, found = (clients.train(way, [3, 4]) for way in (clients.alone, clients.grouped))
    for (metrics, values), (metrics_found, values_found) in zip(expected, found, strict=True):
        assert values_found.dtype == torch.float32
        assert metrics_found.loss_sum == pytest.approx(metrics.loss_sum, rel=0.05)
        assert (values_found - values).abs().mean() < 0.2 * 0.01


def test_the_model_is_left_as_it_was(vit):
    clients = Clients(vit, masked(vit))
    before = copy.deepcopy(vit.state_dict())
    clients.train(clients.grouped, [0, 1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert all(layer.fused for layer in vit.modules() if isinstance(layer, Attention))


def test_rounds_of_fedavg_are_the_same(vit):
    def rounds(model, way):
        clients = Clients(model, dense(model), "sgd")
        found = list(fedavg(model, clients.entries, getattr(clients, way), SIZES, fraction=0.7, rounds=2, seed=0))
        return found, clients.entries.gather(named_tensors(model))

    expected, found = rounds(copy.deepcopy(vit), "alone"), rounds(vit, "grouped")
    assert [r.clients for r in found[0]] == [r.clients for r in expected[0]]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_training_that_fails_is_one_client_s_outcome_and_the_others_have_theirs(vit):
    clients = Clients(vit, dense(vit))
    theta = Values(clients.entries.moving_rows(named_tensors(vit)))
    expected = [[part.clone() for part in values] for _, values in clients.grouped(7, [3, 4, 5], theta)]
    clients.spoilt = 4
    outcomes = list(clients.grouped(7, [3, 4, 5], theta))
    assert isinstance(outcomes[1], BadUpdateError)
    assert str(outcomes[1]).startswith("the loss became nan at local step 2, learning rate 0")
    for outcome, values in zip(outcomes[::2], expected[::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outcome[1], values, strict=True))


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(10, 4, 7), (8, 4, 3), (3, 4, 2), (1, 1, 2)])
def test_a_plan_is_the_sizes_of_the_batches_drawn(count, batch_size, steps):
    drawn = islice(batch_positions(count, batch_size, generator(0, "b")), steps)
    assert batch_sizes(count, batch_size, steps) == tuple(len(batch) for batch in drawn)


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip"])
def test_stacked_batches_are_those_of_each_holder(vit, augmentation):
    images, indices = Clients(vit, head(vit)).images, [torch.arange(3, 10).numpy(), torch.arange(20, 27).numpy()]
    options = {"steps": 4, "batch_size": 4, "augmentation": augmentation}
    view = View(8, (0.0,) * 3, (1.0,) * 3)
    rngs = [generator(0, "batches", holder) for holder in (0, 1)]
    stacked = list(stacked_batches(images, indices, view, rngs=rngs, **options))
    for holder in (0, 1):
        rng = generator(0, "batches", holder)
        own = list(training_batches(images, indices[holder], view, rng=rng, **options))
        for (pixels, labels), (own_pixels, own_labels) in zip(stacked, own, strict=True):
            assert torch.equal(pixels[holder], own_pixels)
            assert torch.equal(labels[holder], own_labels)


def test_the_measurement_goes_on_while_larger_groups_are_faster(monkeypatch):
    """A step takes 10 ms alone, and in groups 15 ms and 1 ms more per client, from 8 clients on 8 ms per client."""
    clock, tried = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def steps_of(size):
        tried.append(size)
        took = 0.010 if size == 1 else 0.015 + 0.001 * size if size < 8 else 0.008 * size
        if size > 16:
            raise torch.OutOfMemoryError

        def steps():
            clock[0] += 4 * took

        return steps

    assert seconds_a_step(steps_of, 64) == pytest.approx({1: 0.010, 2: 0.0085, 4: 0.00475, 8: 0.008})
    assert tried == [1, 2, 4, 8]
    tried.clear()
    assert max(seconds_a_step(steps_of, 5)) == 5
    assert tried == [1, 2, 3, 5]
    assert list(seconds_a_step(lambda size: steps_of(size + 16 * (size > 1)), 6)) == [1]
