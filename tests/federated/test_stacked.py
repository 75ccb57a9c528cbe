import copy
import math
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedtalos.data.batches import batch_positions, batch_sizes, sent_at_once, stacked_batches, training_batches
from fedtalos.data.images import LabelledImages
from fedtalos.data.view import View
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.engine import step as steps
from fedtalos.training.federated import stacked as in_stacks
from fedtalos.training.federated.algorithms import ALGORITHMS, FedAvg
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Lost, fedavg, one_by_one
from fedtalos.training.federated.stacked import Stack, filled, stacked
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.schedule import Schedule

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


class BothWays:
    """Both ways to train the same clients of the same model, in float64 so that only roundings of 1e-16 differ."""

    def __init__(
        self,
        vit,
        masks,
        rule="adamw",
        clip_norm=0.5,
        precision="fp32",
        size=3,
        *,
        double=True,
        augmentation="crop_flip",
    ):
        self.vit = vit.double() if precision == "fp32" and double else vit
        self.moving = MaskedParameters(vit, masks)
        pixels = torch.randint(0, 256, (sum(SIZES), 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
        images = LabelledImages(pixels, torch.arange(len(pixels)) % 5)
        self.clients = Clients.of(images, np.repeat(np.arange(len(SIZES)), SIZES), len(SIZES))
        vit.std = (0.25, 0.25, 0.25)
        self.local = LocalTraining(
            steps=STEPS,
            batch_size=BATCH,
            optimizer=rule,
            learning_rate=Schedule(0.01, 4, "step", step_every=1, step_gamma=0.5),
            momentum=0.9,
            weight_decay=0.1,
            clip_norm=clip_norm,
            augmentation=augmentation,
            precision=precision,
        )
        self.size, self.sizes_seen, self.spoilt, self.of_a_round = size, [], None, 0.0
        self.compile = "off"

    def engine(self, way):
        def make(moving, clients, local, seed, algorithm):
            watch = self.in_the_models_type
            if way == "alone":
                return one_by_one(moving, clients, local, seed, algorithm, watch=watch)
            return stacked(moving, clients, local, seed, algorithm, size=self.size, compile=self.compile, watch=watch)

        return make

    def in_the_models_type(self, batches, share):
        for step, (images, labels) in enumerate(batches):
            if labels.dim() == 2 and step == 0:
                self.sizes_seen.append(len(labels))
            if self.spoilt is not None and step == 1:
                images[self.spoilt] *= math.inf
            yield images.to(self.vit.pos_embed.dtype), labels
            self.of_a_round += share

    def train(self, way, clients=range(7), number=1):
        """Metrics and values (A,) of every client."""
        theta = self.moving.copy()
        start, found = theta.vector.clone(), []
        updates = self.engine(way)(self.moving, self.clients, self.local, 0, FedAvg())
        for client, (asked, update) in zip(clients, updates(number, list(clients), theta), strict=True):
            assert asked == client
            if isinstance(update, Lost):
                found.append(update)
            else:
                found.append((update.metrics, torch.cat([part.flatten() for part in update.values])))
        self.moving.load(theta)
        assert torch.equal(theta.vector, start)
        return found


@pytest.mark.parametrize("moves", [dense, masked, head])
@pytest.mark.parametrize(("rule", "clip_norm"), [("adamw", 0.5), ("sgd", None), ("sgd", 0.5)])
def test_equals_one_by_one_up_to_rounding(vit, moves, rule, clip_norm):
    clients = BothWays(vit, moves(vit), rule, clip_norm)
    for number in (1, 2):
        expected, found = (clients.train(way, number=number) for way in ("alone", "stacked"))
        for (metrics, values), (metrics_found, values_found) in zip(expected, found, strict=True):
            assert (metrics_found.correct, metrics_found.examples) == (metrics.correct, metrics.examples)
            assert metrics_found.loss_sum == pytest.approx(metrics.loss_sum, rel=1e-5)
            torch.testing.assert_close(values_found, values, rtol=1e-5, atol=1e-7)
    assert clients.sizes_seen == [2, 1, 3, 1] * 2
    assert clients.of_a_round == pytest.approx(4)  # what is shown of two rounds, both ways


def test_frozen_entries_keep_their_bits_and_moving_ones_do_not(vit):
    masks = masked(vit)
    clients = BothWays(vit, masks)
    rows = {name: mask for name, mask in masks.items() if mask.any()}
    chosen = torch.cat([part.flatten() for part in clients.moving.entries.moving_rows(rows)])
    start = clients.moving.copy().vector
    for _, values in clients.train("stacked", [0, 1]):
        assert torch.equal(values[~chosen], start[~chosen])
        assert (values[chosen] != start[chosen]).double().mean() > 0.99


def test_bf16_is_near_one_by_one_and_weights_stay_float32(vit):
    clients = BothWays(vit, dense(vit), precision="bf16")
    expected, found = (clients.train(way, [3, 4]) for way in ("alone", "stacked"))
    for (metrics, values), (metrics_found, values_found) in zip(expected, found, strict=True):
        assert values_found.dtype == torch.float32
        assert metrics_found.loss_sum == pytest.approx(metrics.loss_sum, rel=0.05)
        assert (values_found - values).abs().mean() < 0.2 * 0.01


def test_the_model_is_left_as_it_was(vit):
    clients = BothWays(vit, masked(vit))
    before = copy.deepcopy(vit.state_dict())
    clients.train("stacked", [0, 1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_rows_that_another_mask_lets_move_do_not_count(vit):
    masks = masked(vit)
    expected = BothWays(copy.deepcopy(vit), masks).train("stacked", [0, 1])
    clients = BothWays(vit, masks)
    MaskedParameters(vit, {"blocks.3.mlp.fc1.weight": masks["blocks.3.mlp.fc1.weight"].roll(7, 0)})
    for (_, values), (_, same) in zip(clients.train("stacked", [0, 1]), expected, strict=True):
        assert torch.equal(values, same)


def test_rounds_of_fedavg_are_the_same(vit, monkeypatch):
    made = []
    monkeypatch.setattr(in_stacks, "Stack", lambda *given, **how: made.append(given[-1]) or Stack(*given, **how))

    def rounds(model, way):
        clients = BothWays(model, dense(model), "sgd")
        options = {"local": clients.local, "fraction": 0.7, "rounds": 3, "engine": clients.engine(way)}
        return list(fedavg(clients.moving, clients.clients, **options)), clients.moving.vector(), clients.sizes_seen

    expected, theirs, none = rounds(copy.deepcopy(vit), "alone")
    found, ours, sizes = rounds(vit, "stacked")
    assert [r.clients for r in found] == [r.clients for r in expected]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert (none, len(sizes) > len(made)) == ([], True)  # later rounds find the first ones' stacks


def test_training_that_fails_is_one_client_s_outcome_and_the_others_have_theirs(vit):
    clients = BothWays(vit, dense(vit))
    expected = clients.train("stacked", [3, 4, 5])
    clients.spoilt = 1
    first, second, third = clients.train("stacked", [3, 4, 5])
    assert isinstance(second, Lost)
    assert second.sent
    assert second.why.startswith("the loss became nan at local step 2, learning rate 0")
    assert torch.equal(first[1], expected[0][1])
    assert torch.equal(third[1], expected[2][1])


@pytest.mark.parametrize("fits", [1, 0])
def test_stacks_that_do_not_fit_into_memory_are_halved(vit, fits, monkeypatch, caplog):
    clients = BothWays(vit, head(vit))
    expected = clients.train("alone")
    train = Stack.train

    def in_little_memory(stack, batches, learning_rate):
        if stack.size > fits:
            next(iter(batches))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(stack, batches, learning_rate)

    monkeypatch.setattr(Stack, "train", in_little_memory)
    for (metrics, values), (metrics_found, values_found) in zip(expected, clients.train("stacked"), strict=True):
        assert metrics_found.examples == metrics.examples
        torch.testing.assert_close(values_found, values, rtol=1e-5, atol=1e-7)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "a stack of 2 does not fit into memory: clients train 1 at once from now on"
    assert len(said) == 2 - fits


def test_a_client_without_images_is_lost_and_its_neighbours_train(vit):
    clients = BothWays(vit, dense(vit))
    clients.clients = Clients.of(clients.clients.images, np.repeat([0, 1, 4, 5], [6, 6, 6, 19]), 6)
    found = clients.train("stacked", range(6))
    assert found[2] == found[3] == Lost("no images")
    assert all(update[0].examples == 6 for update in (found[0], found[1], found[4]))
    assert clients.sizes_seen == [2, 1, 1]


@pytest.mark.parametrize(
    ("name", "moves", "rule", "double", "how", "compile"),
    [
        *((name, dense, "sgd", False, {}, "off") for name in ALGORITHMS),
        *((name, masked, "adamw", True, {"epochs": 1}, "off") for name in ALGORITHMS),  # 2, 1 or 2 steps
        *((name, masked, "adamw", True, {"steps": 3}, "graph") for name in ("fedavg", "fedprox", "scaffold")),
    ],
)
def test_three_rounds_of_every_algorithm_equal_those_of_one_by_one(
    vit, name, moves, rule, double, how, compile, recorded
):
    """AdamW in float64: of gradients that are but rounding it makes steps of its full rate, 1e-5 of an update."""

    def rounds(model, way):
        clients = BothWays(model, moves(model), rule, double=double)
        clients.compile = compile
        before = clients.moving.vector()
        options = {"local": clients.local.but(**how), "rounds": 3, "fraction": 0.6, "engine": clients.engine(way)}
        trained = fedavg(clients.moving, clients.clients, algorithm=ALGORITHMS[name](), **options)
        return [round.train for round in trained], clients.moving.vector() - before

    expected, theirs = rounds(copy.deepcopy(vit), "alone")
    found, ours = rounds(vit, "stacked")
    assert [round.correct for round in found] == [round.correct for round in expected]
    exact = double and ours.device.type == "cpu"  # a CUDA graph's learning rate is float32
    assert (ours - theirs).norm() < (1e-10 if exact else 1e-5) * theirs.norm()
    assert bool(recorded) == (compile == "graph")


def test_places_that_are_left_over_are_filled_up_and_do_not_count(vit, recorded):
    clients = BothWays(vit, dense(vit), "sgd", size=5)
    clients.compile = "graph"
    expected = clients.train("alone")
    for (metrics, values), (metrics_found, values_found) in zip(expected, clients.train("stacked"), strict=True):
        assert (metrics_found.correct, metrics_found.examples) == (metrics.correct, metrics.examples)
        torch.testing.assert_close(values_found, values, rtol=1e-5, atol=1e-7)
    assert clients.sizes_seen == [2, 1, 4, 1]
    assert [filled(count, 6) for count in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def test_full_stacks_alone_are_compiled(vit, monkeypatch):
    ways = {}
    monkeypatch.setattr(
        in_stacks, "Stack", lambda *given, compile, **how: ways.update({given[-1]: compile}) or Stack(*given, **how)
    )
    clients = BothWays(vit, head(vit), size=3)
    clients.compile = "on"
    clients.train("stacked")
    assert ways == {1: "graph", 2: "graph", 3: "on"}


@pytest.mark.parametrize("moves", [masked, head])
def test_kept_features_of_frozen_stages_are_what_stacks_train_on(vit, moves, monkeypatch):
    clients = BothWays(vit, moves(vit), "sgd", double=False, augmentation="none")
    assert clients.moving.frozen_stages
    expected = clients.train("alone")
    monkeypatch.setattr(vit.patch_embed, "forward", None)  # images are not looked at again
    for (metrics, values), (metrics_found, values_found) in zip(expected, clients.train("stacked"), strict=True):
        assert metrics_found.correct == metrics.correct
        torch.testing.assert_close(values_found, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(10, 4, 7), (8, 4, 3), (3, 4, 2), (1, 1, 2)])
def test_a_plan_is_the_sizes_of_the_batches_drawn(count, batch_size, steps):
    drawn = islice(batch_positions(count, batch_size, generator(0, "b")), steps)
    assert batch_sizes(count, batch_size, steps) == tuple(len(batch) for batch in drawn)


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip"])
def test_stacked_batches_are_those_of_each_holder(vit, augmentation):
    images, indices = (
        BothWays(vit, head(vit)).clients.images,
        [torch.arange(3, 10).numpy(), torch.arange(20, 27).numpy()],
    )
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


def test_what_is_sent_at_once_is_what_was_drawn():
    draws = [(torch.arange(6).view(2, 3), torch.arange(18).view(3, 6)), (torch.arange(2).view(2, 1), torch.ones(3, 2))]
    draws = [(chosen, crops.long()) for chosen, crops in draws]
    for sent, drawn in zip(sent_at_once(iter(draws), torch.device("cpu")), draws, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(sent, drawn, strict=True))


class Launched(TorchDispatchMode):
    """Counts operations that compute, as a device would be sent them one by one."""

    count = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def test_what_a_round_launches_beside_captured_steps_does_not_grow_with_the_tensors(vit, monkeypatch):
    """A launch takes the host 6 to 20 us: one for each tensor of each client would cost more than the steps do."""

    class Captured:
        def __init__(self, step, *_, **__):
            self.step, self.figures = step, None

        def __call__(self, *inputs):
            self.figures = self.step(*inputs) if self.figures is None else self.figures
            return self.figures.clone()

    monkeypatch.setattr(steps, "Steps", Captured)
    images = LabelledImages(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.arange(40) % 5)
    clients, launched = Clients.of(images, np.repeat(np.arange(10), 4), 10), []
    for masks in (head(vit), dense(vit)):
        engine = partial(stacked, size=10)
        local = LocalTraining(steps=1, batch_size=4, augmentation="crop_flip")
        rounds = fedavg(vit, clients, masks, local=local, rounds=2, fraction=1, engine=engine)
        next(rounds)
        with Launched() as counting:
            next(rounds)
        launched.append(counting.count)
    few, many = launched
    assert len(dense(vit)) > 70
    assert many == few < 150
