"""Hugging Face transformers' folder: model.safetensors, config.json and preprocessor_config.json.

A plain ViT becomes a ViTForImageClassification. One with layer scale becomes a Dinov2ForImageClassification, one with
registers a Dinov2WithRegistersForImageClassification: their classifiers see the patches' mean too, to which the head
gets weights of 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.export.pixels import as_json, for_transformers
from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS, VisionTransformer
from fedtalos.models.weights.names import renamed

_NAMES = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"^norm\.", "layernorm."),
)
_OF_VIT = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
"""timm's names -> those of transformers; DINOv2's keep norm1, norm2 and mlp as they are."""


def hugging_face_files(model: Backbone, classes: Sequence[str]) -> dict[str, bytes]:
    """Make the files that ``AutoModelForImageClassification.from_pretrained(FOLDER)`` reads.

    Raises InputError for models of other libraries, which transformers does not know.

    >>> sorted(hugging_face_files(model, ("cat", "dog")))
    ['config.json', 'model.safetensors', 'preprocessor_config.json']
    """
    if not isinstance(model, VisionTransformer):
        raise InputError(
            f"format hf: transformers has no {model.architecture}; take safetensors-timm, torchscript or onnx"
        )
    kind, part = _kind(model)
    tensors = in_transformers_names(model, part)
    return {
        "config.json": as_json(_config(model, kind, part, classes)),
        "model.safetensors": save(tensors, {"format": "pt"}),
        "preprocessor_config.json": as_json(for_transformers(model)),
    }


def in_transformers_names(model: VisionTransformer, part: str) -> dict[str, Tensor]:
    """Rename a ViT's tensors to those of transformers' ``part``: vit, dinov2 or dinov2_with_registers.

    >>> in_transformers_names(model, "vit")["classifier.weight"].shape
    torch.Size([2, 192])
    """
    tensors = _divided(model.state_dict())
    weight, bias = tensors.pop("head.weight"), tensors.pop("head.bias")
    rules = _NAMES + (_OF_VIT if part == "vit" else ())
    if part != "vit":
        width, depth, _ = WIDTH_DEPTH_HEADS[model.architecture.size]
        weight = torch.cat([weight, torch.zeros_like(weight)], dim=1)  # (C, 2 D): nothing of the patches' mean
        tensors["embeddings.mask_token"] = torch.zeros(1, width)
        if not model.architecture.layer_scale:
            tensors |= {f"blocks.{n}.ls{which}.gamma": torch.ones(width) for n in range(depth) for which in (1, 2)}
    if not model.architecture.class_position:
        tensors["pos_embed"] = torch.cat([torch.zeros_like(tensors["pos_embed"][:, :1]), tensors["pos_embed"]], dim=1)
    named = {f"{part}.{renamed(name, rules)}": tensor.contiguous() for name, tensor in tensors.items()}
    return {**named, "classifier.weight": weight.contiguous(), "classifier.bias": bias}


def _kind(model: VisionTransformer) -> tuple[str, str]:
    """Name transformers' class and its part that holds the backbone, which is the model's type too."""
    if model.architecture.registers:
        return "Dinov2WithRegistersForImageClassification", "dinov2_with_registers"
    if model.architecture.layer_scale:
        return "Dinov2ForImageClassification", "dinov2"
    return "ViTForImageClassification", "vit"


def _config(model: VisionTransformer, kind: str, part: str, classes: Sequence[str]) -> dict[str, Any]:
    architecture = model.architecture
    width, depth, heads = WIDTH_DEPTH_HEADS[architecture.size]
    of_part: dict[str, Any] = {"intermediate_size": 4 * width} if part == "vit" else {"mlp_ratio": 4}
    if architecture.registers:
        of_part["num_register_tokens"] = architecture.registers
    return {
        "architectures": [kind],
        "model_type": part,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        **of_part,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "num_channels": 3,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def _divided(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide each qkv layer, (3 D, D), into query, key and value, (D, D) each."""
    divided: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." not in name:
            divided[name] = tensor
            continue
        for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            divided[name.replace(".qkv.", f".{part}.")] = third
    return divided
