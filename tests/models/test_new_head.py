"""A new head on loaded weights is drawn by a stream of its own: never the one that the weights were trained from."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedtalos.app.load import checkpoint_weights, load
from fedtalos.cli import main, parse
from fedtalos.models.backbone import Backbone
from fedtalos.models.load import build_model, model_with_weights
from fedtalos.models.vision_transformer import Architecture
from fedtalos.models.weights import Weights
from fedtalos.models.weights.pixels import HALF

CLASSES = tuple("abcde")


def weights_of(model: Backbone, sha256: str) -> Weights:
    return Weights({**model.state_dict()}, model.architecture, *HALF, "mine", sha256, classes=CLASSES)


@pytest.fixture
def scratch() -> Backbone:
    return build_model(Architecture("micro", 8, 4, 5), seed=3)


def new_head(weights: Weights, seed: int = 3, **more: str) -> torch.Tensor:
    model = model_with_weights(weights, CLASSES, seed=seed, head="random")
    assert model.head_source == "random"
    assert not model.head.bias.any()
    return model.head.weight.detach()


def test_it_is_not_the_head_of_the_weights_drawn_at_the_same_seed(scratch: Backbone) -> None:
    drawn = new_head(weights_of(scratch, "a"))
    assert not torch.equal(drawn, scratch.head.weight)
    cosine = torch.nn.functional.cosine_similarity(drawn.flatten(), scratch.head.weight.flatten(), dim=0)
    assert abs(cosine) < 0.2  # of 480 numbers: independent ones have a deviation of 0.05
    assert drawn.std().item() == pytest.approx(scratch.head.weight.std().item(), rel=0.1)


def test_nor_one_drawn_anew_before_they_were_trained_on(scratch: Backbone) -> None:
    """Weights, a new head, training, weights of another checksum, a new head: all at one seed."""
    first = weights_of(scratch, "a")
    then = weights_of(model_with_weights(first, CLASSES, seed=3, head="random"), "b")
    assert not torch.equal(new_head(first), new_head(then))


def test_it_depends_on_seed_and_weights_alone(scratch: Backbone) -> None:
    weights = weights_of(scratch, "a")
    assert torch.equal(new_head(weights), new_head(replace(weights, source="another name")))
    assert not torch.equal(new_head(weights), new_head(weights, seed=4))


def test_the_weights_own_head_is_kept_where_it_is_to_be(scratch: Backbone) -> None:
    kept = model_with_weights(weights_of(scratch, "a"), CLASSES, seed=3)
    assert kept.head_source == "weights"
    assert torch.equal(kept.head.weight, scratch.head.weight)


def test_a_run_on_a_runs_weights_begins_with_a_head_that_knows_nothing(in_a_folder_of_its_own, without_figures) -> None:
    shared = "--dataset digits --device cpu --image_size 8 --train_limit 200 --eval_limit 60"
    scratch = f"centralized {shared} --weights none --model_size micro --patch_size 4 --num_epochs 3 --run_name a"
    main(shlex.split(scratch))
    config = parse(shlex.split(f"centralized {shared} --weights a --head random"))
    again = load(config).model
    trained = checkpoint_weights(Path("checkpoints/a/last.json"))
    fresh = build_model(Architecture("micro", 8, 4, 10), seed=0)
    assert torch.equal(again.blocks[0].attn.qkv.weight, trained.tensors["blocks.0.attn.qkv.weight"])
    for weight in (fresh.head.weight, trained.tensors["head.weight"]):
        assert abs(torch.nn.functional.cosine_similarity(again.head.weight.flatten(), weight.flatten(), dim=0)) < 0.2
    save_file({name: tensor for name, tensor in trained.tensors.items() if "/" not in name}, "plain.safetensors")
    from_file = load(parse(shlex.split(f"centralized {shared} --weights plain.safetensors --head random"))).model
    assert (
        abs(torch.nn.functional.cosine_similarity(from_file.head.weight.flatten(), fresh.head.weight.flatten(), 0))
        < 0.2
    )
