"""Parameter names of plain ViTs by DINO, DINOv2 and Hugging Face transformers, turned into timm's."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedtalos.errors import InputError, shown

_DINOV2 = (
    (r"^register_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # trained in chunks on many GPUs: the second number is the block's
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III's
)

_TRANSFORMERS = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),  # cls_token, mask_token
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),  # as DINOv2 calls its gated MLP
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)

_UNUSED = ("mask_token", "pooler.")
"""A token for pretraining on masked patches alone, and a layer that transformers adds but nobody trained."""


def in_timms_names(label: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a plain ViT to timm's names, whoever published it; unknown names stay.

    A head that sees more than the class token is left out: transformers' DINOv2 classifiers see the patches' mean too.

    Raises InputError, naming the weights by ``label``, where two names become one.

    >>> list(in_timms_names("vit.pth", {"register_tokens": torch.zeros(1, 4, 384)}))
    ['reg_token']
    """
    transformers = any(name.startswith("embeddings.") for name in tensors)
    origins: dict[str, str] = {}
    for name in tensors:
        new = renamed(name, _TRANSFORMERS if transformers else _DINOV2)
        if new.startswith(_UNUSED):
            continue
        if new in origins:
            raise InputError(
                f"weights {label}: {shown(origins[new])} and {shown(name)} both mean {shown(new)}; save one of them"
            )
        origins[new] = name
    named = {new: tensors[name] for new, name in origins.items()}
    if transformers:
        _join_query_key_value(named)
        head, token = named.get("head.weight"), named.get("cls_token")
        if head is not None and token is not None and head.shape[-1:] != token.shape[-1:]:
            named = {name: tensor for name, tensor in named.items() if not name.startswith("head.")}
    return named


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Rewrite a name by rules, (pattern, replacement), one after another.

    >>> renamed("encoder.layer.0.output.dense.bias", [(r"^encoder\\.layer\\.", "blocks.")])
    'blocks.0.output.dense.bias'
    """
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _join_query_key_value(tensors: dict[str, Tensor]) -> None:
    """Join blocks.N.attn.query, .key and .value, each (D, D), to blocks.N.attn.qkv, (3 D, D), in place."""
    for name in [name for name in tensors if ".attn.query." in name]:
        thirds = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        parts = [tensors[third] for third in thirds if third in tensors]
        joined = name.replace(".query.", ".qkv.")
        fit = len(parts) == 3 and parts[0].dim() > 0 and parts[0].shape == parts[1].shape == parts[2].shape
        if fit and joined not in tensors:
            tensors[joined] = torch.cat([tensors.pop(third) for third in thirds])
