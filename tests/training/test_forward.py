"""Forward and backward passes that are captured: evaluation and Fisher scores, against themselves as they stand."""

import gc
import weakref

import numpy as np
import pytest
import torch

from fedtalos.data.images import LabelledImages
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.fisher import fisher_scores, scored_batches, scores_of_each
from fedtalos.training.engine import forward
from fedtalos.training.evaluation import evaluate, evaluate_batches
from fedtalos.training.feature_cache import FeatureStore
from fedtalos.training.masked_parameters import MaskedParameters, head_mask


@pytest.fixture
def stored(device) -> LabelledImages:
    pixels = torch.randint(0, 256, (22, 3, 8, 8), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
    return LabelledImages(pixels, torch.arange(22) % 5).to(device)


def test_evaluation_has_the_same_figures_and_keeps_its_graphs(vit, stored, recorded):
    for model in (vit, MaskedParameters(vit), MaskedParameters(vit, head_mask(vit))):
        expected = evaluate_batches(model, stored, batch_size=5)
        for _ in range(2):
            assert evaluate_batches(model, stored, batch_size=5, compile="graph") == expected
    assert len(recorded) == 4  # images and features, whole batches and the last one: each when it came again


def test_graphs_follow_the_model_s_values_and_go_when_these_move_or_end(stored, recorded):
    device = stored.pixels.device
    model = VisionTransformer(Architecture("micro", 8, 2, 5), torch_generator(0, "test")).to(device)
    evaluate(model, stored, batch_size=5, compile="graph")
    with torch.no_grad():
        model.head.weight.mul_(-3)  # in place, as training does
    assert evaluate(model, stored, batch_size=5, compile="graph") == evaluate(model, stored, batch_size=5)
    assert len(recorded) == 2
    model.head.weight.data = torch.zeros(5, 96, device=device)
    assert evaluate(model, stored, batch_size=5, compile="graph") == evaluate(model, stored, batch_size=5)
    assert len(forward._kept[model]) == 1 + 1  # as it stands, and the graphs of now
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_features_are_the_same_through_a_graph(vit, stored, recorded):
    expected, found = (FeatureStore(batch_size=5, compile=way).features(vit, stored)[0] for way in ("off", "graph"))
    assert torch.equal(found, expected)
    assert found.shape == (22, 96)
    assert not found.is_inference()  # they may be trained on
    assert len(recorded) == 1


@pytest.mark.parametrize("compile", ["off", "graph"])
def test_holders_have_the_scores_that_each_has_alone_by_steps_captured_once(vit, stored, compile, recorded):
    masks, parts = eligible_entries(vit).masks, np.array_split(np.arange(22), 3)

    def batches(ids):
        return scored_batches(vit, stored, ids, batch_size=11)

    alone = [fisher_scores(vit, batches(ids), masks, chunk=1) for ids in parts]
    found = scores_of_each(vit, map(batches, parts), masks, chunk=1, compile=compile)
    for scores, expected in zip(found, alone, strict=True):
        assert all(torch.equal(scores[name], score) for name, score in expected.items())
    assert len(recorded) == (compile == "graph")


@pytest.mark.parametrize("mode", ["true", "exact", "empirical"])
def test_scores_are_the_same_through_a_graph(vit, stored, mode, recorded):
    masks = eligible_entries(vit).masks

    def scores(compile):
        batches = scored_batches(vit, stored, batch_size=11)
        return fisher_scores(vit, batches, masks, mode=mode, chunk=1, compile=compile)

    expected, found = scores("off"), scores("graph")
    assert len(recorded) == 1
    assert all(torch.equal(found[name], score) for name, score in expected.items())
