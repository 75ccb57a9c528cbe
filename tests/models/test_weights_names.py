"""Names of DINOv2 and of transformers (as transformers 5.23 saves them), read as timm's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.load import load_into
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.read import load_weights
from fedtalos.randomness import torch_generator

State = dict[str, Tensor]

PLAIN = Architecture("micro", 16, 4, 10)
DINOV2 = Architecture("micro", 16, 4, 0, layer_scale=True)
WITH_REGISTERS = Architecture("micro", 16, 4, 0, registers=4, layer_scale=True)


def state_of(architecture: Architecture) -> State:
    """A state dict in timm's names, without a head where there are no classes."""
    model = VisionTransformer(PLAIN if architecture is PLAIN else with_head(architecture), torch_generator(0, "theirs"))
    return {
        n: torch.randn_like(p) for n, p in model.state_dict().items() if architecture.num_classes or "head" not in n
    }


def with_head(architecture: Architecture) -> Architecture:
    return Architecture(**{**architecture.as_dict(), "num_classes": 10})


def as_dinov2(state: State) -> State:
    """In the original's names, its blocks in chunks of three."""
    named = {"mask_token": torch.zeros(1, 96)}
    for name, tensor in state.items():
        first, *rest = name.split(".", 2)
        chunk = f"blocks.{int(rest[0]) // 3}.{rest[0]}.{rest[1]}" if first == "blocks" else name
        named["register_tokens" if name == "reg_token" else chunk] = tensor
    return named


TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "attn.proj": "attention.output.dense",
}
VIT = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense"} | {
    "mlp.fc2": "output.dense"
}
DINOV2_LAYERS = {"ls1": "layer_scale1", "ls2": "layer_scale2"}


def as_transformers(state: State, layers: dict[str, str], prefix: str) -> State:
    """In transformers' names, before which the models with a head have a prefix."""
    words, named = TRANSFORMERS | layers, {f"{prefix}pooler.dense.weight": torch.zeros(96, 96)}
    for name, tensor in state.items():
        block, inner = (name.split(".", 2)[1], name.split(".", 2)[2]) if name.startswith("blocks.") else ("", name)
        layer, _, kind = inner.rpartition(".") if "." in inner else (inner, "", "")
        where = f"{prefix}encoder.layer.{block}." if block else prefix
        if layer == "attn.qkv":
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                named[f"{where}attention.attention.{part}.{kind}"] = third.clone()
        elif layer == "head":
            named[f"classifier.{kind}"] = tensor
        else:
            named[where + ".".join(filter(None, (words.get(layer, layer), kind.replace("gamma", "lambda1"))))] = tensor
    return named


@pytest.mark.parametrize(
    ("architecture", "theirs"),
    [
        (DINOV2, as_dinov2),
        (WITH_REGISTERS, as_dinov2),
        (PLAIN, lambda state: as_transformers(state, VIT, "vit.")),
        (DINOV2, lambda state: as_transformers(state, DINOV2_LAYERS, "")),
        (WITH_REGISTERS, lambda state: as_transformers(state, DINOV2_LAYERS, "dinov2_with_registers.")),
    ],
    ids=["DINOv2", "registers", "transformers ViT", "transformers DINOv2", "transformers registers"],
)
def test_other_publishers_names_are_read_as_timms(tmp_path: Path, architecture: Architecture, theirs) -> None:
    state = state_of(architecture)
    save_file(theirs(state), tmp_path / "vit.safetensors")
    weights = load_weights(str(tmp_path / "vit.safetensors"), "micro")
    assert weights.architecture == architecture
    assert weights.tensors.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.tensors.items())
    model = VisionTransformer(with_head(architecture), torch_generator(0, "ours"))
    assert load_into(model, weights) == ([] if architecture is PLAIN else ["head.weight", "head.bias"])


def test_a_classifier_of_more_than_the_class_token_is_left_out(tmp_path: Path) -> None:
    state = as_transformers(state_of(DINOV2), DINOV2_LAYERS, "dinov2.") | {"classifier.weight": torch.ones(10, 192)}
    save_file(state, tmp_path / "vit.safetensors")
    assert load_weights(str(tmp_path / "vit.safetensors"), "micro").architecture.num_classes == 0


def test_transformers_deit_is_refused_for_its_distillation_token(tmp_path: Path) -> None:
    state = as_transformers(state_of(PLAIN), VIT, "deit.") | {
        "deit.embeddings.distillation_token": torch.ones(1, 1, 96)
    }
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(InputError, match="a distillation token"):
        load_weights(str(tmp_path / "vit.safetensors"), "micro")


def test_a_missing_key_projection_is_named(tmp_path: Path) -> None:
    state = as_transformers(state_of(PLAIN), VIT, "")
    del state["encoder.layer.2.attention.attention.key.weight"]
    save_file(state, tmp_path / "vit.safetensors")
    model = VisionTransformer(PLAIN, torch_generator(0, "ours"))
    with pytest.raises(InputError, match=r"1 missing \(blocks.2.attn.qkv.weight\); 2 unexpected \(blocks.2.attn.query"):
        load_into(model, load_weights(str(tmp_path / "vit.safetensors"), "micro"))
