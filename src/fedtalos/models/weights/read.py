"""Pretrained weights, from the Hugging Face hub (hub.py) or a file: read, checked, fitted to a model.

Letters: D width, g patches a side; 1 + g² position embeddings, the class token's first, or g² where it has none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.library_model import LIBRARIES, ForeignArchitecture
from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS, Architecture, ModelSize, VisionTransformer
from fedtalos.models.weights.hub import FILES, download, hub_address
from fedtalos.models.weights.library import published
from fedtalos.models.weights.names import in_timms_names
from fedtalos.models.weights.pixels import STATISTICS, Channels, statistics
from fedtalos.models.weights.state_dicts import read_tensors, sha256_of

GATED = "a gated MLP (SwiGLU)"
_FOREIGN_PARTS = {
    ".mlp.w12.": GATED,
    ".q_norm.": "query and key norms",
    "norm_pre.": "a norm before the blocks",
    "fc_norm.": "average pooling before the head (fc_norm)",
    "pre_logits.": "a pre-logits layer",
    "dist_token": "a distillation token",
}
_NEEDED_PARTS = {
    "cls_token": "a class token (as SigLIP's)",
    "pos_embed": "a position embedding (rotary positions, as DINOv3's)",
}
_INSTEAD = "give a plain ViT, or timm:NAME"


@dataclass(frozen=True)
class Weights:
    """A state dict in timm's names, float32 on the CPU, and what its shapes and its makers say of it.

    ``source`` is "hub:OWNER/REPO@revision", a file name or a checkpoint's path; ``sha256`` is of the file.
    """

    tensors: dict[str, Tensor]
    architecture: Architecture | ForeignArchitecture
    mean: Channels
    std: Channels
    source: str
    sha256: str
    classes: tuple[str, ...] | None = None
    """Names of the head's classes, where they are known (in our checkpoints)."""


def read_weights(source: str, size: ModelSize, *, normalisation: str = "auto") -> Weights:
    """Read ``source``: "pretrained" or "dino" (for ``size``), a timm ViT's name, "hf:OWNER/REPO[/FILE]", or a file.

    Or "timm:NAME" or "torch:NAME", for what is no plain ViT of ours (foreign.py).

    Names of parameters may be timm's, DINO's, DINOv2's or transformers'. Mean and std are those of the hub's JSON
    files, of one beside the weights with the same stem, or of the safetensors metadata; else ImageNet's where the name
    says dino, else 0.5. A name in STATISTICS as ``normalisation`` overrides them.

    Raises InputError where the source is unknown, unreachable, unreadable, not finite, or no plain ViT.
    """
    if source.startswith(tuple(LIBRARIES)):
        given = published(source)
        mean, std = STATISTICS.get(normalisation) or (given.mean, given.std)
        architecture = ForeignArchitecture(source, given.image_size, num_classes=0)
        return Weights(given.tensors, architecture, mean, std, given.source, given.sha256)
    if source.endswith(FILES) and not source.startswith("hf:"):
        path, configs, label = Path(source), [Path(source).with_suffix(".json")], Path(source).name
        if not path.is_file():
            raise InputError(f"--weights {source}: no such file; give an existing file, a timm model name or none")
    else:
        found = download(*hub_address(source, size))
        path, configs, label = found.weights, found.configs, found.label
    raw, metadata = read_tensors(path, label)
    tensors = in_timms_names(raw)
    mean, std = STATISTICS.get(normalisation) or statistics(label, configs, metadata)
    return Weights(tensors, _architecture(label, tensors), mean, std, label, sha256_of(path))


def load_into(model: Backbone, weights: Weights) -> list[str]:
    """Copy the weights into the model and return the names that keep their initial value: none, or the head's two.

    A ViT's position embedding is resampled to the model's grid; the head is loaded where the class counts agree.

    Raises InputError, with the model untouched, where size, patch size, names or shapes differ.
    """
    ours, theirs = model.architecture, weights.architecture
    if str(ours) != str(theirs):
        raise InputError(
            f"weights {weights.source}: expected a {ours}, got a {theirs}; "
            "give --model_size and --patch_size of the weights, or --weights none"
        )
    new_head = ["head.weight", "head.bias"] if theirs.num_classes != ours.num_classes else []
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in new_head}
    if isinstance(model, VisionTransformer):
        grid, prefix = model.patch_embed.grid, int(model.architecture.class_position)
        tensors["pos_embed"] = resample_position_embedding(tensors["pos_embed"], grid, prefix=prefix)
    parameters = {name: p for name, p in model.named_parameters() if name not in new_head}
    _check_names_and_shapes(weights.source, parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return new_head


def resample_position_embedding(pos_embed: Tensor, grid: int, *, prefix: int = 1) -> Tensor:
    """Position embedding for another image size, (1, prefix + g², D) -> (1, prefix + grid², D).

    The first ``prefix`` (the class token's) are kept, the patches are interpolated bicubically with antialiasing, as
    timm's ``resample_abs_pos_embed`` does.
    """
    old = math.isqrt(pos_embed.shape[1] - prefix)
    if old == grid:
        return pos_embed
    kept, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    square = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([kept, square.flatten(2).transpose(1, 2)], dim=1)


def _architecture(label: str, tensors: Mapping[str, Tensor]) -> Architecture:
    """What the shapes say: the image size is the one that the position embedding is for."""
    _refuse_other_kinds(label, tensors)
    ranks = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    ranks |= {name: rank for name, rank in {"head.weight": 2, "reg_token": 3}.items() if name in tensors}
    for name, rank in ranks.items():
        if name not in tensors or tensors[name].ndim != rank or 0 in tensors[name].shape:
            raise InputError(
                f"weights {label}: no {name} of {rank} dimensions; "
                "give a ViT with the parameter names of timm, DINO or transformers"
            )
    width = tensors["cls_token"].shape[2]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    size = next((s for s, (w, d, _) in WIDTH_DEPTH_HEADS.items() if (w, d) == (width, depth)), None)
    if size is None:
        known = ", ".join(f"{s} {w} and {d}" for s, (w, d, _) in WIDTH_DEPTH_HEADS.items())
        raise InputError(f"weights {label}: width {width} and depth {depth} are no known size; give {known}")
    grid, class_position = _grid(label, tuple(tensors["pos_embed"].shape), width)
    patch_size = tensors["patch_embed.proj.weight"].shape[3]
    return Architecture(
        size,
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_classes=len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        registers=tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        layer_scale=any(".ls1." in name for name in tensors),
        class_position=class_position,
    )


def _refuse_other_kinds(label: str, tensors: Mapping[str, Tensor]) -> None:
    found = [words for part, words in _FOREIGN_PARTS.items() if any(part in name for name in tensors)]
    into, out_of = (tensors.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    if into is not None and out_of is not None and into.dim() == out_of.dim() == 2:
        found += [GATED] if len(into) == 2 * out_of.shape[1] else []  # as timm packs it
    if found:
        raise InputError(f"weights {label}: a ViT with {found[0]}, which this model has not; {_INSTEAD}")
    absent = [words for name, words in _NEEDED_PARTS.items() if name not in tensors]
    if len(absent) == 1 and "patch_embed.proj.weight" in tensors:
        raise InputError(f"weights {label}: a ViT without {absent[0]}, which this model needs; {_INSTEAD}")


def _grid(label: str, shape: tuple[int, ...], width: int) -> tuple[int, bool]:
    """Patches a side, and whether the class token has a position embedding too: no two squares above 0 differ by 1."""
    for prefix in (1, 0):
        grid = math.isqrt(max(shape[1] - prefix, 0))
        if grid > 0 and shape == (1, prefix + grid**2, width):
            return grid, bool(prefix)
    raise InputError(
        f"weights {label}: expected a position embedding (1, 1 + a square, {width}), got {shape}; "
        "give weights made for square images"
    )


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
