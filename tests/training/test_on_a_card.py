"""The CUDA path on a pretended card: no tensor of the wrong device, no hidden wait, no graph that goes stale."""

from functools import partial

import numpy as np
import pytest
import torch
from card import CARD, CPU, CardError, pretended_card

from fedtalos.data.images import LabelledImages
from fedtalos.models import vision_transformer
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.centralized import train_centralized
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.fisher import fisher_scores, scored_batches
from fedtalos.training.engine.capture import Steps
from fedtalos.training.engine.step import Stack
from fedtalos.training.evaluation import evaluate_batches
from fedtalos.training.feature_cache import FeatureStore, view_of
from fedtalos.training.federated.algorithms import FedProx, Scaffold
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, fedavg, one_by_one
from fedtalos.training.federated.stacked import stacked
from fedtalos.training.head_fitting import fit_head
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters, head_mask

TOGETHER = partial(stacked, size=3, compile="graph")


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(vision_transformer.WIDTH_DEPTH_HEADS, "toy", (24, 3, 2))


def model_and_images(device):
    model = VisionTransformer(Architecture("toy", 12, 4, 5), torch_generator(0, "weights")).to(device)
    pixels = torch.randint(0, 256, (36, 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
    images = LabelledImages(pixels, torch.arange(36) % 5).to(device)
    view_of(model)(images.pixels[:1])  # the mean by channel goes to the card once in a process
    return model, images


def dense(_model):
    return None


def some(model):
    mask = {"blocks.1.attn.qkv.weight": torch.rand(72, 24, generator=torch_generator(0, "mask")) < 0.2}
    return mask | {"blocks.2.mlp.fc1.bias": torch.arange(96) % 3 > 0} | head_mask(model)


def rounds(device, engine, what, make, **options):
    """What moves after two rounds."""
    model, images = model_and_images(device)
    moving = MaskedParameters(model, what(model), features=FeatureStore(compile="graph" if device == CARD else "off"))
    clients = Clients.of(images, np.arange(36) // 9, 4)
    local = LocalTraining(steps=3, batch_size=4, learning_rate=1e-2, **options)
    yield from fedavg(moving, clients, local=local, rounds=2, fraction=0.75, algorithm=make(), engine=engine)
    yield moving.vector().cpu()


@pytest.mark.parametrize(
    ("engine", "what", "make", "options"),
    [
        (TOGETHER, dense, FedAvg, {"augmentation": "crop_flip", "optimizer": "sgd"}),
        (TOGETHER, some, partial(FedProx, 0.5), {"optimizer": "sgd"}),
        (TOGETHER, some, Scaffold, {"groups": ((0, 1), (2, 3, 4))}),
        (TOGETHER, head_mask, FedAvg, {"clip_norm": None, "precision": "bf16"}),
        (one_by_one, some, Scaffold, {"augmentation": "crop"}),
    ],
)
def test_rounds_compute_there_what_they_do_on_a_cpu(monkeypatch, engine, what, make, options):
    *_, expected = rounds(CPU, one_by_one, what, make, **options)
    with pretended_card(monkeypatch) as card:
        going = rounds(CARD, engine, what, make, **options)
        next(going)
        card.waits.clear()
        next(going)
        waits = len(card.waits)
        *_, found = going
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if engine is TOGETHER:  # at the end of a stack, and to see that each of three updates is finite
        assert waits <= 10


def central(device):
    """One epoch in stacks of one: what moves, and its optimiser's moments."""
    model, images = model_and_images(device)
    moving = MaskedParameters(model, some(model))
    local = LocalTraining(epochs=1, batch_size=8, learning_rate=1e-2)
    optimizer = local.optimizer_for(moving)
    way = "graph" if device == CARD else "off"
    for _ in train_centralized(moving, images, local=local, epochs=1, optimizer=optimizer, compile=way):
        pass
    moments = [state["exp_avg"].flatten() for state in optimizer.state.values()]
    return torch.cat([moving.vector(), *moments]).cpu()


def test_one_holder_trains_there_as_on_a_cpu(monkeypatch):
    expected = central(CPU)
    with pretended_card(monkeypatch):
        found = central(CARD)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def measured(device):
    """A head of clients' sums, figures through the whole model and from features, and a mask of scores."""
    model, images = model_and_images(device)
    way = "graph" if device == CARD else "off"
    store = FeatureStore(batch_size=5, compile=way)
    fit_head(model, images, holders=[np.arange(9), np.arange(9, 30)], val=images.slice(30, None), features=store)
    moving = MaskedParameters(model, head_mask(model), features=store)
    figures = [evaluate_batches(found, images, batch_size=7, compile=way) for found in (model, moving)]
    eligible = eligible_entries(model)
    scores = fisher_scores(model, scored_batches(model, images), eligible.masks, chunk=2, compile=way)
    losses = [metrics.loss for found in figures for metrics in found]
    return [torch.tensor(losses), model.head.weight.detach().cpu(), eligible.gather(scores).cpu()]


def test_heads_evaluation_and_scores_are_there_what_they_are_on_a_cpu(monkeypatch):
    expected = measured(CPU)
    with pretended_card(monkeypatch):
        found = measured(CARD)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


class Faults:
    """Steps that a real card would refuse, or that would compute something else in a graph, without a word."""

    def __init__(self):
        self.kept = torch.ones(2, device=CARD)

    def waits(self, x):
        return x * x.sum().item()

    def mixes(self, x):
        return x + torch.ones(2)

    def takes_a_number_of_the_host(self, x):
        return x + torch.ones(())

    def writes_what_is_not_undone(self, x):
        return self.kept.add_(x)

    def reads_what_is_replaced(self, x):
        made = x + self.kept
        self.kept = made.clone()
        return made


@pytest.mark.parametrize("fault", [name for name in vars(Faults) if not name.startswith("_")])
def test_the_pretended_card_finds_faults(monkeypatch, fault):
    with pretended_card(monkeypatch):
        step, x = Steps(getattr(Faults(), fault), compile="graph"), torch.ones(2, device=CARD)
        with pytest.raises(CardError):
            [step(x) for _ in range(3)]


def test_the_pretended_card_finds_a_batch_that_is_sent_from_pageable_memory(monkeypatch):
    with pretended_card(monkeypatch):
        model, _ = model_and_images(CARD)
        stack = Stack(MaskedParameters(model), LocalTraining(), 2)
        batches = ((torch.ones(2, 1, 3, 12, 12).to(CARD), torch.ones(2, 1).long().to(CARD)) for _ in range(1))
        with pytest.raises(CardError, match="pageable"):
            stack.train(batches, 0.1)
