import argparse
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.load import load_into, resample_position_embedding
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.pixels import HALF, IMAGENET
from fedtalos.models.weights.read import load_weights
from fedtalos.randomness import torch_generator

State = dict[str, Tensor]


def micro(image_size: int = 16, patch_size: int = 4, classes: int = 10, source: str = "theirs") -> VisionTransformer:
    architecture = Architecture("micro", image_size, patch_size, classes)
    return VisionTransformer(architecture, torch_generator(0, source))


def headless(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def state() -> State:
    return micro().state_dict()


@pytest.fixture
def file(tmp_path: Path, state: State) -> Path:
    path = tmp_path / "vit.safetensors"
    save_file(state, path)
    return path


def refused(path: Path, state: State) -> str:
    """The sentence with which a file of that state is refused."""
    save_file(state, path)
    with pytest.raises(InputError) as refusal:
        load_into(micro(source="ours"), load_weights(str(path), "micro"))
    return str(refusal.value)


def test_a_saved_model_comes_back_bit_for_bit(file: Path, state: State) -> None:
    weights = load_weights(str(file), "large")
    assert weights.architecture == Architecture("micro", 16, 4, 10)
    assert weights.source == "vit.safetensors"
    assert weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    ours = micro(source="ours")
    assert load_into(ours, weights) == []
    assert same(ours.state_dict(), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"module." + name: tensor for name, tensor in s.items()},
        lambda s: {"teacher": {"module.backbone." + name: tensor for name, tensor in s.items()}, "student": {}},
    ],
    ids=["plain", "state_dict", "model", "module.", "teacher"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_of_plain_tensors_are_read(
    tmp_path: Path, state: State, wrap: Callable[[State], object], zipped: bool
) -> None:
    torch.save(wrap(state), tmp_path / "vit.pth", _use_new_zipfile_serialization=zipped)
    assert same(load_weights(str(tmp_path / "vit.pth"), "micro").tensors, state)


def test_dinos_projection_is_left_out_of_a_teacher_only(tmp_path: Path, state: State) -> None:
    path = tmp_path / "checkpoint.pth"
    dino = headless(state) | {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_v": torch.ones(2, 2)}
    torch.save({"teacher": dino}, path)
    weights = load_weights(str(path), "micro")
    assert weights.architecture.num_classes == 0
    assert same(weights.tensors, headless(state))
    torch.save(dino, path)
    with pytest.raises(InputError, match=r"2 unexpected \(head.mlp.0.weight, head.last_layer.weight_v\)"):
        load_into(micro(), load_weights(str(path), "micro"))


def test_what_dino_and_dinov2_keep_beside_the_teacher_is_left_out(tmp_path: Path, state: State) -> None:
    teacher = {f"backbone.{name}": tensor for name, tensor in headless(state).items()}
    teacher |= {"dino_head.mlp.0.weight": torch.ones(2, 2), "backbone.mask_token": torch.ones(1, 96)}
    torch.save({"teacher": teacher, "args": argparse.Namespace(arch="vit"), "epoch": 9}, tmp_path / "vit.pth")
    assert same(load_weights(str(tmp_path / "vit.pth"), "micro").tensors, headless(state))


def test_optimiser_state_beside_the_model_is_left_out(file: Path, state: State) -> None:
    save_file(state | {"optimizer/0/exp_avg": torch.ones(3), "optimizer/step": torch.tensor(7)}, file)
    assert same(load_weights(str(file), "micro").tensors, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(file: Path, state: State, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, file)
    expected = {name: tensor.to(dtype).float() for name, tensor in state.items()}
    assert same(load_weights(str(file), "micro").tensors, expected)


@pytest.mark.parametrize("in_file", [7, None], ids=["other classes", "no head"])
def test_a_head_for_other_classes_keeps_its_initial_value(file: Path, in_file: int | None) -> None:
    theirs = micro(classes=in_file or 10).state_dict()
    save_file(theirs if in_file else headless(theirs), file)
    ours = micro(source="ours")
    initial = ours.head.weight.clone()
    assert load_into(ours, load_weights(str(file), "micro")) == ["head.weight", "head.bias"]
    assert torch.equal(ours.head.weight, initial)
    assert same(headless(ours.state_dict()), headless(theirs))


def test_another_image_size_resamples_the_position_embedding_alone(file: Path, state: State) -> None:
    ours = micro(image_size=24, source="ours")
    assert load_into(ours, load_weights(str(file), "micro")) == []
    resampled = resample_position_embedding(state["pos_embed"], 6)
    assert same(ours.state_dict(), state | {"pos_embed": resampled})


@settings(deadline=None)
@given(old=st.integers(1, 9), new=st.integers(1, 9), dim=st.integers(1, 4))
def test_resampling_keeps_the_class_token_constants_and_transposition(old: int, new: int, dim: int) -> None:
    embedding = torch.randn(1, 1 + old * old, dim, generator=torch_generator(0, "embedding", old, dim))
    resampled = resample_position_embedding(embedding, new)
    assert resampled.shape == (1, 1 + new * new, dim)
    assert torch.equal(resampled[:, 0], embedding[:, 0])
    if old == new:
        assert torch.equal(resampled, embedding)
    flat = torch.full_like(embedding, 0.25)
    torch.testing.assert_close(resample_position_embedding(flat, new), torch.full((1, 1 + new * new, dim), 0.25))

    def transposed(tokens: Tensor, side: int) -> Tensor:
        square = tokens[:, 1:].reshape(1, side, side, dim).transpose(1, 2)
        return torch.cat([tokens[:, :1], square.reshape(1, -1, dim)], 1)

    torch.testing.assert_close(resample_position_embedding(transposed(embedding, old), new), transposed(resampled, new))


def test_another_size_or_patch_is_refused_with_both_named(file: Path) -> None:
    weights = load_weights(str(file), "micro")
    with pytest.raises(InputError, match=r"expected a ViT-micro/8, got a ViT-micro/4; give .* patch_size"):
        load_into(micro(patch_size=8), weights)
    tiny = VisionTransformer(Architecture("tiny", 16, 4, 10), torch_generator(0, "ours"))
    with pytest.raises(InputError, match=r"expected a ViT-tiny/4, got a ViT-micro/4; give model_size"):
        load_into(tiny, weights)


def test_missing_unexpected_and_misshapen_tensors_are_counted_and_leave_the_model_alone(
    file: Path, state: State
) -> None:
    broken = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.3.mlp.")}
    broken |= {"other_token": torch.ones(1), "norm.bias": torch.ones(5)}
    save_file(broken, file)
    ours = micro(source="ours")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(InputError) as refusal:
        load_into(ours, load_weights(str(file), "micro"))
    assert "4 missing (blocks.3.mlp.fc1.weight, blocks.3.mlp.fc1.bias, blocks.3.mlp.fc2.weight, …)" in str(
        refusal.value
    )
    assert "1 unexpected (other_token)" in str(refusal.value)
    assert "1 misshapen (norm.bias (5,) instead of (96,))" in str(refusal.value)
    assert same(ours.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.0.mlp.w12.weight", "a gated MLP (SwiGLU)"),
        ("blocks.0.attn.q_norm.weight", "query and key norms"),
        ("norm_pre.weight", "a norm before the blocks"),
        ("fc_norm.weight", "fc_norm"),
        ("pre_logits.fc.weight", "a pre-logits layer"),
        ("dist_token", "a distillation token"),
    ],
)
def test_other_kinds_of_vit_are_refused_in_words(file: Path, state: State, name: str, words: str) -> None:
    assert words in refused(file, state | {name: torch.ones(96)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.bias": torch.full((96,), torch.nan)}, "norm.bias holds NaN or infinity"),
        ({"norm.bias": torch.full((96,), torch.inf)}, "norm.bias holds NaN or infinity"),
        ({"norm.bias": torch.full((96,), 1e300, dtype=torch.float64)}, "norm.bias holds NaN or infinity"),
        ({"norm.bias": torch.ones(96, dtype=torch.int8)}, "norm.bias is torch.int8"),
        ({"norm.bias": torch.ones(96).to(torch.float8_e4m3fn)}, "norm.bias is torch.float8_e4m3fn"),
        ({"pos_embed": torch.ones(1, 16, 96)}, "expected a ViT-micro/4, got a ViT-micro/4 with no class position"),
        ({"pos_embed": torch.ones(1, 18, 96)}, "(1, 18, 96)"),
        ({"pos_embed": torch.ones(1, 1, 0)}, "no pos_embed of 3 dimensions"),
        ({"reg_token": torch.ones(1, 96)}, "no reg_token of 3 dimensions"),
        ({"reg_token": torch.ones(1, 4, 96)}, "got a ViT-micro/4 with 4 registers"),
        ({"blocks.0.ls1.gamma": torch.ones(96)}, "got a ViT-micro/4 with layer scale"),
        ({"blocks.0.mlp.fc1.weight": torch.ones(768, 96)}, "a gated MLP (SwiGLU)"),
        ({"pos_embed": torch.ones(2, 17, 96)}, "(2, 17, 96)"),
        ({"pos_embed": torch.ones(17, 96)}, "no pos_embed of 3 dimensions"),
        ({"head.weight": torch.ones(())}, "no head.weight of 2 dimensions"),
        ({"cls_token": torch.ones(1, 1, 97)}, "width 97 and depth 6 are no known size"),
        ({"blocks.6.norm1.weight": torch.ones(96)}, "width 96 and depth 7 are no known size"),
        ({"patch_embed.proj.weight": torch.ones(96, 1, 4, 4)}, "(96, 1, 4, 4) instead of (96, 3, 4, 4)"),
    ],
)
def test_unusable_tensors_are_refused_by_name(file: Path, state: State, change: State, words: str) -> None:
    assert words in refused(file, state | change)


@pytest.mark.parametrize(("name", "words"), [("cls_token", "a class token"), ("pos_embed", "rotary positions")])
def test_kinds_of_vit_that_lack_something_are_refused_in_words(file: Path, state: State, name: str, words: str) -> None:
    assert words in refused(file, {other: tensor for other, tensor in state.items() if other != name})


def test_a_file_that_is_no_vit_is_refused(file: Path) -> None:
    assert "no cls_token of 3 dimensions" in refused(file, {"conv1.weight": torch.ones(3, 3)})


@settings(deadline=None, max_examples=30)
@given(cut=st.floats(0, 1, exclude_max=True), suffix=st.sampled_from([".safetensors", ".pth"]))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: float, suffix: str) -> None:
    path = tmp_path_factory.mktemp("cut") / f"vit{suffix}"
    state = {"cls_token": torch.ones(1, 1, 96)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(InputError, match="neither a whole safetensors file nor a torch state dict"):
        load_weights(str(path), "micro")


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".safetensors", ".pth"]))
def test_any_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"vit{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_weights(str(path), "micro")


class Hostile:
    """Its pickle asks the reader to make a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("bare", [True, False])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, bare: bool) -> None:
    path, trace = tmp_path / "vit.pth", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Hostile(trace))) if bare else torch.save({"cls_token": Hostile(trace)}, path)
    with pytest.raises(InputError, match="neither a whole safetensors file nor a torch state dict"):
        load_weights(str(path), "micro")
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": 1}}, {"a": [torch.ones(1)]}])
def test_a_torch_file_without_plain_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "vit.pt")
    with pytest.raises(InputError, match=r"expected tensors by name|no tensor"):
        load_weights(str(tmp_path / "vit.pt"), "micro")


STATED = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
PLAIN = {"mean": STATED[0], "std": STATED[1]}


@pytest.mark.parametrize(
    ("name", "sidecar", "metadata", "expected"),
    [
        ("vit", None, None, HALF),
        ("vit_small.DINO", None, None, IMAGENET),
        ("dino", PLAIN, None, STATED),
        ("dino", {"architecture": "vit", "pretrained_cfg": PLAIN}, None, STATED),
        ("dino", None, {"pixels": json.dumps(PLAIN)}, STATED),
        ("dino", {"epoch": 3}, {"format": "pt"}, IMAGENET),
        ("dino", {"image_mean": STATED[0], "image_std": STATED[1], "size": 224}, None, STATED),
    ],
)
def test_mean_and_std_are_the_files_own(
    tmp_path: Path, state: State, name: str, sidecar: object, metadata: dict[str, str] | None, expected: object
) -> None:
    path = tmp_path / f"{name}.safetensors"
    save_file(state, path, metadata)
    if sidecar is not None:
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    weights = load_weights(str(path), "micro")
    assert (weights.mean, weights.std) == expected
    for flag, forced in (("imagenet", IMAGENET), ("half", HALF)):
        weights = load_weights(str(path), "micro", normalisation=flag)
        assert (weights.mean, weights.std) == forced


@pytest.mark.parametrize(
    "sidecar",
    [
        "{",
        "[]",
        '{"mean": [0.5, 0.5, 0.5]}',
        '{"mean": 0.5, "std": 0.5}',
        '{"mean": [0, 0, 0], "std": [1, 1, 0]}',
        '{"mean": [0, 0, NaN], "std": [1, 1, 1]}',
        '{"pretrained_cfg": null}',
    ],
)
def test_unusable_mean_and_std_are_refused(file: Path, sidecar: str) -> None:
    file.with_suffix(".json").write_text(sidecar)
    with pytest.raises(InputError, match=r"vit\.json: expected .* mean and std .* normalisation imagenet or half"):
        load_weights(str(file), "micro")
    assert load_weights(str(file), "micro", normalisation="half").mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        ("pretrained", "micro", "tiny, small, base, large, not for micro; give .* weights none or FILE"),
        ("dino", "tiny", "small, base, not for tiny; give one of those as model_size"),
        ("pretraind", "tiny", "expected none, pretrained, dino, a timm ViT's name"),
        ("resnet50.a1_in1k", "tiny", "expected none, pretrained, dino, a timm ViT's name"),
        ("../vit_small", "tiny", "expected none, pretrained, dino, a timm ViT's name"),
        ("hf:owner", "tiny", "expected .* hf:OWNER/REPO"),
        ("hf:owner/repo/config.json", "tiny", r"files end in \.safetensors"),
        ("not/there.safetensors", "tiny", "no such file"),
    ],
)
def test_unknown_sources_are_refused_with_a_way_out(source: str, size: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_weights(source, size)


def test_an_unknown_normalisation_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match="normalisation imagnet: expected auto, imagenet or half"):
        load_weights(file, normalisation="imagnet")


@pytest.mark.slow
def test_the_real_vit_tiny_is_recognised() -> None:
    path = os.environ.get("FEDTALOS_WEIGHTS")
    if path is None:
        pytest.skip("needs real weights: set FEDTALOS_WEIGHTS to an ImageNet ViT-Ti/16 file")
    weights = load_weights(path, "small")
    assert weights.architecture == Architecture("tiny", 224, 16, 1000)
    model = VisionTransformer(Architecture("tiny", 96, 16, 100), torch_generator(0, "ours"))
    assert load_into(model, weights) == ["head.weight", "head.bias"]
