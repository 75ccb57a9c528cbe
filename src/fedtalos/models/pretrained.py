"""Pretrained weights, from the Hugging Face hub (hub.py) or a file: read, checked, fitted to a model.

Letters: D width, g patches a side; 1 + g² tokens, the class token first.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.hub import FILES, download, hub_name
from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS, ModelSize, VisionTransformer

Channels = tuple[float, float, float]
"""One number per colour channel, for pixels in 0..1."""

IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"imagenet": IMAGENET, "half": HALF}
"""Pixel mean and deviation by name."""

_FOREIGN_PARTS = {
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    ".ls1.": "layer scale",
    ".q_norm.": "query and key norms",
    "norm_pre.": "a norm before the blocks",
    "fc_norm.": "average pooling before the head (fc_norm)",
    "pre_logits.": "a pre-logits layer",
    "dist_token": "a distillation token",
}


@dataclass(frozen=True)
class Weights:
    """A state dict in timm's names, float32 on the CPU, and what its shapes and its makers say of it.

    Sizes in pixels a side; ``num_classes`` is 0 where the file has no head; ``source`` is
    "hub:timm/NAME@revision" or a file name.
    """

    tensors: dict[str, Tensor]
    image_size: int
    patch_size: int
    num_classes: int
    size: ModelSize
    mean: Channels
    std: Channels
    source: str
    sha256: str
    classes: tuple[str, ...] | None = None
    """Names of the head's classes, where they are known (in our checkpoints)."""


def read_weights(source: str, size: ModelSize, *, normalisation: str = "auto") -> Weights:
    """Read ``source``: "pretrained" or "dino" (for ``size``), a timm model name, or a .safetensors/.pth/.pt file.

    Mean and std are those of the hub's config.json, of a JSON file beside the weights with the same stem, or of
    the safetensors metadata; else ImageNet's where the name says dino, else 0.5. A name in STATISTICS as
    ``normalisation`` overrides them.
    Names with a "/" (optimiser state in our checkpoints) are left out.

    Raises InputError where the source is unknown, unreachable, unreadable, not finite, or no plain timm ViT.
    """
    if source.endswith(FILES):
        path, config, label = Path(source), Path(source).with_suffix(".json"), Path(source).name
        if not path.is_file():
            raise InputError(f"--weights {source}: no such file; give an existing file, a timm model name or none")
    else:
        path, config, label = download(hub_name(source, size))
    raw, metadata = _read_tensors(path)
    tensors = {name: _as_float32(label, name, tensor) for name, tensor in raw.items()}
    mean, std = STATISTICS.get(normalisation) or _statistics(label, config, metadata)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Weights(tensors, *_geometry(label, tensors), mean, std, label, sha256)


def load_into(model: VisionTransformer, weights: Weights) -> list[str]:
    """Copy the weights into the model and return the names that keep their initial value: none, or the head's two.

    The position embedding is resampled to the model's grid; the head is loaded where the class counts agree.

    Raises InputError, with the model untouched, where size, patch size, names or shapes differ.
    """
    ours = model.architecture
    if (ours.size, ours.patch_size) != (weights.size, weights.patch_size):
        raise InputError(
            f"weights {weights.source}: expected a ViT-{ours.size}/{ours.patch_size}, got a ViT-{weights.size}/"
            f"{weights.patch_size}; give --model_size {weights.size} --patch_size {weights.patch_size}, "
            "or --weights none"
        )
    new_head = ["head.weight", "head.bias"] if weights.num_classes != ours.num_classes else []
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in new_head}
    tensors["pos_embed"] = resample_position_embedding(tensors["pos_embed"], model.patch_embed.grid)
    parameters = {name: p for name, p in model.named_parameters() if name not in new_head}
    _check_names_and_shapes(weights.source, parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return new_head


def resample_position_embedding(pos_embed: Tensor, grid: int) -> Tensor:
    """Position embedding for another image size, (1, 1 + g², D) -> (1, 1 + grid², D).

    The class token is kept, the patches are interpolated bicubically with antialiasing, as timm's
    ``resample_abs_pos_embed`` does.
    """
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    class_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    square = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([class_token, square.flatten(2).transpose(1, 2)], dim=1)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors of the model by plain name, and the safetensors metadata."""
    metadata: Mapping[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                content: Any = {name: file.get_tensor(name) for name in file.keys() if "/" not in name}  # noqa: SIM118
                metadata = file.metadata() or {}
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or hostile file makes either reader raise anything
        raise InputError(
            f"weights {path}: neither a whole safetensors file nor a torch state dict of plain tensors "
            f"({type(error).__name__}); fetch it again, or save the state dict alone with torch.save"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"weights {path}: expected tensors by name, got a {type(content).__name__}; save a state dict")
    key = next((key for key in ("state_dict", "model", "teacher") if isinstance(content.get(key), dict)), None)
    tensors = {}
    for full_name, tensor in (content if key is None else content[key]).items():
        name = str(full_name).removeprefix("module.").removeprefix("backbone.")
        if not isinstance(tensor, Tensor):
            raise InputError(f"weights {path}: {name} is a {type(tensor).__name__}, no tensor; save a state dict alone")
        if "/" not in name and not (key == "teacher" and name.startswith(("head.mlp.", "head.last_layer."))):
            tensors[name] = tensor
    return tensors, metadata


def _as_float32(label: str, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.layout != torch.strided:
        raise InputError(f"weights {label}: {name} is {tensor.dtype}; give weights in float32, float16 or bfloat16")
    tensor = tensor.detach().to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise InputError(f"weights {label}: {name} holds NaN or infinity; give weights of a run that did not diverge")
    return tensor


def _geometry(label: str, tensors: Mapping[str, Tensor]) -> tuple[int, int, int, ModelSize]:
    """Image side and patch side in pixels, number of classes and model size, as the shapes say them."""
    for part, words in _FOREIGN_PARTS.items():
        if any(part in name for name in tensors):
            raise InputError(f"weights {label}: a ViT with {words}, which this model has not; give a plain timm ViT")
    ranks = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    for name, rank in (ranks | {"head.weight": 2} if "head.weight" in tensors else ranks).items():
        if name not in tensors or tensors[name].ndim != rank:
            raise InputError(f"weights {label}: no {name} of {rank} dimensions; give a ViT with timm's parameter names")
    width = tensors["cls_token"].shape[2]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    size = next((s for s, (w, d, _) in WIDTH_DEPTH_HEADS.items() if (w, d) == (width, depth)), None)
    if size is None:
        known = ", ".join(f"{s} {w} and {d}" for s, (w, d, _) in WIDTH_DEPTH_HEADS.items())
        raise InputError(f"weights {label}: width {width} and depth {depth} are no known size; give {known}")
    shape = tuple(tensors["pos_embed"].shape)
    grid = math.isqrt(max(shape[1] - 1, 0))
    if grid == 0 or shape != (1, 1 + grid**2, width):
        raise InputError(
            f"weights {label}: expected a position embedding (1, 1 + a square, {width}), got {shape}; "
            "give weights made for square images"
        )
    patch_size = tensors["patch_embed.proj.weight"].shape[3]
    num_classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    return grid * patch_size, patch_size, num_classes, cast(ModelSize, size)


def _statistics(label: str, config: Path, metadata: Mapping[str, str]) -> tuple[Channels, Channels]:
    stated = _stated(str(config), config.read_text("utf-8", "replace")) if config.is_file() else None
    if stated is None:
        stated = _stated(f"metadata of weights {label}", metadata.get("pixels", "{}"))
    return stated or (IMAGENET if "dino" in label.lower() else HALF)


def _stated(where: str, text: str) -> tuple[Channels, Channels] | None:
    """Mean and std in a JSON object, plain or under timm's pretrained_cfg; None where it has neither."""
    try:
        config = json.loads(text)
        config = config.get("pretrained_cfg", config)
        if "mean" not in config and "std" not in config:
            return None
        mean, std = ([float(value) for value in config[key]] for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("no three usable numbers")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{where}: expected a JSON object with three numbers each for mean and std (above 0); "
            "mend it, or override it with --normalisation imagenet or half"
        ) from error
    return cast(Channels, tuple(mean)), cast(Channels, tuple(std))


def _check_names_and_shapes(label: str, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in parameters if name not in tensors]
    unexpected = [name for name in tensors if name not in parameters]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise InputError(
            f"weights {label}: expected the {len(parameters)} tensors of this model in timm's names, but "
            f"{'; '.join(faults)}; give weights of a plain ViT, or --weights none"
        )
