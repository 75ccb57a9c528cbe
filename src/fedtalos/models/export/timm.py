"""timm's folder: model.safetensors and config.json, as timm pushes them to the hub."""

from collections.abc import Sequence
from typing import Any

from safetensors.torch import save
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.export.pixels import as_json, for_timm
from fedtalos.models.library_model import LibraryModel
from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS, Architecture, VisionTransformer

BASES = {"micro": "tiny"}
"""Sizes that timm has no name for -> one whose numbers are replaced by ours."""


def timm_files(model: Backbone, classes: Sequence[str]) -> dict[str, bytes]:
    """Make the files that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads.

    Raises InputError for a model of torchvision, and for one of timm whose classifier is no single layer.

    >>> sorted(timm_files(model, ("cat", "dog")))
    ['config.json', 'model.safetensors']
    """
    if isinstance(model, VisionTransformer):
        name, width, arguments = _vit(model.architecture)
        tensors, classifier = vit_tensors(model), "head"
        stem: str | None = "patch_embed.proj"
    else:
        name, classifier, stem = _of_timm(model)
        width, arguments = model.head.in_features, {}
        tensors = {path.removeprefix("net."): tensor for path, tensor in model.state_dict().items()}
        for part in ("weight", "bias"):
            tensors[f"{classifier}.{part}"] = tensors.pop(f"head.{part}")
    config = {
        "architecture": name,
        "num_classes": len(classes),
        "num_features": width,
        **({"global_pool": "token", "model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "tag": "fedtalos",
            "custom_load": False,
            **for_timm(model),
            "fixed_input_size": isinstance(model, VisionTransformer),
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": stem,
            "classifier": classifier,
        },
        "label_names": list(classes),
    }
    contiguous = {path: tensor.contiguous() for path, tensor in tensors.items()}
    return {"config.json": as_json(config), "model.safetensors": save(contiguous, {"format": "pt"})}


def vit_tensors(model: VisionTransformer) -> dict[str, Tensor]:
    """Give a ViT's tensors as timm's VisionTransformer takes them.

    timm has no register tokens beside a class token with a position of its own: the position is added to the token.

    >>> vit_tensors(model)["cls_token"].shape
    torch.Size([1, 1, 192])
    """
    tensors = dict(model.state_dict())
    if model.architecture.registers and model.architecture.class_position:
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    return tensors


def _vit(architecture: Architecture) -> tuple[str, int, dict[str, Any]]:
    """Name timm's function, the width, and the arguments that make it a ViT of ours."""
    width, depth, heads = WIDTH_DEPTH_HEADS[architecture.size]
    arguments: dict[str, Any] = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
    }
    if architecture.layer_scale:
        arguments["init_values"] = 1.0  # replaced by the file's
    if architecture.registers:
        arguments["reg_tokens"] = architecture.registers
    if architecture.registers or not architecture.class_position:
        arguments["no_embed_class"] = True
    return f"vit_{BASES.get(architecture.size, architecture.size)}_patch16_224", width, arguments


def _of_timm(model: Backbone) -> tuple[str, str, str | None]:
    """Name the function of timm that makes the model, its classifier and its first convolution."""
    name = str(model.architecture)
    if not isinstance(model, LibraryModel) or not name.startswith("timm:"):
        raise InputError(f"format safetensors-timm: {name} is no model of timm; take torchscript or onnx")
    config: Any = model.net.pretrained_cfg
    classifier, stem = config.get("classifier"), config.get("first_conv")
    if not isinstance(classifier, str):
        raise InputError(
            f"format safetensors-timm: {name} has a classifier of several layers; take torchscript or onnx"
        )
    return name.removeprefix("timm:").split(".")[0], classifier, stem if isinstance(stem, str) else None
