"""A ViT's state dict however it is wrapped: containers, prefixes, endings; which one of several, and refusals."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.load import load_into
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.read import load_weights
from fedtalos.notes import noted
from fedtalos.randomness import torch_generator

State = dict[str, Tensor]


def micro(source: str = "theirs") -> VisionTransformer:
    return VisionTransformer(Architecture("micro", 16, 4, 10), torch_generator(0, source))


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def headless(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def state() -> State:
    noted()
    return {name: tensor.clone() for name, tensor in micro().state_dict().items()}


@pytest.fixture
def other() -> State:
    return micro("another").state_dict()


def read(content: object, path: Path) -> State:
    torch.save(content, path)
    return load_weights(path, "micro").tensors


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "model.",
        "vit.",
        "encoder.",
        "module.",
        "net.",
        "backbone.",
        "module._orig_mod.",
        "_orig_mod.module.model.",
        "model.net.backbone.",
        "trunk.visual.",
        "state.model_0.embeddings_of_images.",
        "teacher.backbone.",
        "module.base_encoder.",
    ],
)
@pytest.mark.parametrize("container", [None, "state_dict", "model", "ema", "weights", "whatever"])
def test_what_all_names_share_is_taken_off(tmp_path: Path, state: State, prefix: str, container: str | None) -> None:
    wrapped = under(prefix, state)
    assert same(read(wrapped if container is None else {container: wrapped, "epoch": 3}, tmp_path / "vit.pth"), state)


@pytest.mark.parametrize("ending", [".pth.tar", ".ckpt", ".bin", ".pt", ".pth", ".PTH", ".model", ""])
def test_any_ending_will_do_since_the_content_decides(tmp_path: Path, state: State, ending: str) -> None:
    assert same(read({"state_dict": state}, tmp_path / f"torch{ending}"), state)
    save_file(state, tmp_path / f"safe{ending}")
    assert same(load_weights(tmp_path / f"safe{ending}", "micro").tensors, state)


def test_a_folder_as_the_hub_lays_it_out_is_its_weights_file(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "model.safetensors")
    weights = load_weights(tmp_path, "micro")
    assert same(weights.tensors, state)
    assert weights.source == f"{tmp_path.name}/model.safetensors"


def test_blocks_that_were_compiled_or_checkpointed_one_by_one_are_read(tmp_path: Path, state: State) -> None:
    inside = {
        name.replace("blocks.1.", "blocks.1._orig_mod.").replace(".mlp.", "._checkpoint_wrapped_module.mlp."): tensor
        for name, tensor in state.items()
    }
    assert same(read(inside, tmp_path / "vit.pt"), state)


LIGHTNING = {
    "epoch": 3,
    "global_step": 120,
    "pytorch-lightning_version": "2.4.0",
    "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
    "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}],
    "hyper_parameters": {"lr": 0.1, "size": "micro", "betas": (0.9, 0.95)},
}
"""What Lightning keeps beside a module's state dict."""


def test_a_lightning_checkpoint_is_read_with_the_head_beside_its_backbone(tmp_path: Path, state: State) -> None:
    tensors = under("model.backbone.", headless(state))
    tensors |= {"model.classifier.weight": state["head.weight"], "model.classifier.bias": state["head.bias"]}
    tensors |= {"criterion.weight": torch.ones(10), "metric.total": torch.tensor(3)}
    weights = read(LIGHTNING | {"state_dict": tensors}, tmp_path / "last.ckpt")
    assert same(weights, state)
    said = noted()["weights file"]
    assert "the ViT under 'state_dict.model.backbone' was taken; 1 other tensors were left out" in said
    assert "criterion.weight" in said


def test_a_layer_beside_the_vit_that_sees_other_features_is_no_head(tmp_path: Path, state: State) -> None:
    beside = {"fc.weight": torch.ones(10, 192), "fc.bias": torch.ones(10)}
    assert same(read(under("vit.", headless(state)) | beside, tmp_path / "vit.pt"), headless(state))


PROJECTION = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_v": torch.ones(2, 2)}
MOCO_HEAD = {"head.0.weight": torch.ones(2, 2), "head.1.running_mean": torch.ones(2)}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s, o: {"student": under("module.backbone.", o), "teacher": under("backbone.", s)}, "teacher.backbone"),
        (lambda s, o: {"model": under("student.backbone.", o) | under("teacher.backbone.", s)}, "teacher.backbone"),
        (lambda s, o: {"teacher": under("backbone.", s) | PROJECTION, "student": o}, "teacher.backbone"),
        (lambda s, o: {"encoder": o, "target_encoder": s, "predictor": PROJECTION}, "target_encoder"),
        (lambda s, o: {"model": o, "model_ema": s}, "model_ema"),
        (lambda s, o: {"state_dict": o, "state_dict_ema": under("module.", s)}, "state_dict_ema"),
        (lambda s, o: {"model": o, "ema": {"n_averaged": torch.tensor(9)} | under("module.", s)}, "ema"),
        (lambda s, o: under("online_model.", o) | under("ema_model.", s) | {"step": torch.tensor(3)}, "ema_model"),
        (lambda s, o: under("module.momentum_encoder.", o) | under("module.base_encoder.", s), "base_encoder"),
        (lambda s, o: under("module.momentum_encoder.", o) | under("module.base_encoder.", s | MOCO_HEAD), "base_enc"),
        (lambda s, o: under("encoder_q.", s) | under("encoder_k.", o), "encoder_q"),
        (lambda s, o: {"student": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, None),
        (lambda s, o: s | under("momentum.", o), "no prefix"),
    ],
)
def test_of_several_the_averaged_one_is_taken_and_said(
    tmp_path: Path, state: State, other: State, wrap: Callable[[State, State], Any], said: str | None
) -> None:
    ours, theirs = headless(state), headless(other)
    assert same(read(wrap(ours, theirs), tmp_path / "checkpoint.pth"), ours)
    sentence = noted().get("weights file")
    assert sentence is None if said is None else said in sentence


def test_maes_decoder_is_left_out_also_where_nothing_wraps_it(tmp_path: Path, state: State) -> None:
    decoder = {"decoder_embed.weight": torch.ones(2, 2), "decoder_pos_embed": torch.ones(1, 17, 2)}
    decoder |= {"decoder_blocks.0.attn.qkv.weight": torch.ones(6, 2), "mask_token": torch.zeros(1, 1, 2)}
    assert same(read(headless(state) | decoder, tmp_path / "a.pth"), headless(state))
    assert same(read({"model": headless(state) | decoder}, tmp_path / "b.pth"), headless(state))


def test_several_that_nothing_tells_apart_are_refused_unless_they_are_equal(
    tmp_path: Path, state: State, other: State
) -> None:
    with pytest.raises(InputError, match=r"several ViTs, under 'best' and 'worst', .* state dict of one alone"):
        read({"best": state, "worst": other}, tmp_path / "vit.pth")
    assert same(read(under("encoder.", state) | under("net.encoder.", state), tmp_path / "vit.pth"), state)


@pytest.mark.parametrize(
    ("change", "first", "second", "become"),
    [
        ({"module.cls_token": torch.ones(1, 1, 96)}, "cls_token", "module.cls_token", "cls_token"),
        ({"blocks.1._orig_mod.norm1.bias": torch.ones(96)}, "blocks.1.norm1.bias", "blocks.1._orig", "blocks.1.norm1"),
        ({"blocks.9.1.norm1.bias": torch.ones(96)}, "blocks.1.norm1.bias", "blocks.9.1.norm1", "blocks.1.norm1"),
        ({"blocks": {"1.norm1.bias": torch.ones(96)}}, "blocks.1.norm1.bias", "blocks.1.norm1", "blocks.1.norm1"),
    ],
)
def test_two_names_that_become_one_are_refused(
    tmp_path: Path, state: State, change: dict[str, Any], first: str, second: str, become: str
) -> None:
    with pytest.raises(InputError, match=rf"{first}.* and .*{second}.* both mean '{become}.*save one of them"):
        read(state | change, tmp_path / "vit.pth")


def test_where_nothing_fits_the_first_names_are_quoted(tmp_path: Path, state: State) -> None:
    resnet = {"conv1.weight": torch.ones(2, 2), "bn1.num_batches_tracked": torch.tensor(4), "fc.weight": torch.ones(2)}
    with pytest.raises(
        InputError, match=r"no cls_token .* 3 tensors \('\S+conv1.weight', '\S+num_b.*', '\S+fc.weight'\)"
    ):
        read({"state_dict": resnet}, tmp_path / "resnet.pth.tar")
    swin = {"module.patch_embed.proj.weight": torch.ones(96, 3, 4, 4), "module.layers.0.x": torch.ones(2)}
    with pytest.raises(InputError, match=r"no cls_token .* 2 tensors \('patch_embed.proj.weight', 'layers.0.x'\)"):
        read({"model": swin}, tmp_path / "swin.pth")
    with pytest.raises(InputError, match=r"whole numbers alone, .* give weights in float32"):
        read({"blocks.0.norm1.weight": torch.ones(96, dtype=torch.uint8)}, tmp_path / "mask.pth")
    with pytest.raises(InputError, match=r"1 unexpected \(adapter.weight\)"):
        load_into(micro(), load_weights(save(under("vit.", state | {"adapter.weight": torch.ones(2)}), tmp_path)))


def save(state: State, folder: Path) -> Path:
    save_file(state, folder / "saved.safetensors")
    return folder / "saved.safetensors"


def test_a_dict_that_holds_itself_ends(tmp_path: Path, state: State) -> None:
    content: dict[str, Any] = {"model": state}
    content |= {"self": content, "deep": {"er": {"model": content}}}
    assert same(read(content, tmp_path / "vit.pth"), state)


def test_options_of_plain_types_are_read_and_objects_are_refused_by_name(tmp_path: Path, state: State) -> None:
    assert same(read({"model": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth"), state)
    with pytest.raises(InputError, match=r"plain tensors \(it pickles a numpy\S+scalar\); .* state dict alone"):
        read({"model": state, "metric": np.float64(0.5)}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"it pickles a pathlib\S+; .* save the state dict alone"):
        read({"model": state, "args": argparse.Namespace(output=tmp_path)}, tmp_path / "c.pth")


def test_weights_of_other_attention_heads_are_refused_since_no_shape_shows_them(tmp_path: Path) -> None:
    small = VisionTransformer(Architecture("small", 16, 16, 10), torch_generator(0, "theirs")).state_dict()
    with pytest.raises(InputError, match=r"a ViT with 12 attention heads, but ViT-small/16 has 6 here"):
        read({"state_dict": under("module.base_encoder.", headless(small))}, tmp_path / "moco.pth.tar")
    path = save(micro().state_dict(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit", "hidden_size": 96, "num_attention_heads": 6}')
    with pytest.raises(InputError, match=r"a ViT with 6 attention heads, but ViT-micro/4 has 3 here"):
        load_weights(path, "micro")
