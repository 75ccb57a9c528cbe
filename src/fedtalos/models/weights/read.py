"""Reading weights, from the Hugging Face hub or a file: fetched, checked, described.

Letters: D width, g patches a side; 1 + g² position embeddings, the class token's first, or g² where it has none.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.facts import refusal
from fedtalos.models.library_model import LIBRARIES
from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS, Architecture
from fedtalos.models.weights import Weights
from fedtalos.models.weights.hub import FILES, NAMES, USUAL, WeightsFile, download, hub_address
from fedtalos.models.weights.library import published
from fedtalos.models.weights.names import in_timms_names
from fedtalos.models.weights.pixels import STATISTICS, Beside, Channels, Preprocessing, preprocessing
from fedtalos.models.weights.state_dicts import StateDict, read_vit
from fedtalos.models.weights.wrappers import OUR_NAMES, some_names
from fedtalos.notes import note

_GATED = "a gated MLP (SwiGLU)"
_UNSUPPORTED_PARTS = {
    ".mlp.w12.": _GATED,
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


def load_weights(source: str | Path, size: str = "small", normalisation: str = "auto") -> Weights:
    """Find, read and check pretrained weights.

    ``source`` is one of

    - "pretrained" or "dino": ImageNet or DINO weights of a ViT of ``size``, from the hub;
    - a timm ViT's name such as "vit_base_patch16_224.dino", or "hf:OWNER/REPO[/FILE]": a plain ViT on the hub;
    - a file of a plain ViT, in the names of timm, DINO, DINOv2 or transformers: .safetensors, .pth, .pt, .bin, .ckpt,
      .pth.tar, whatever containers and prefixes it is wrapped in (wrappers.py), or the folder of a model.safetensors;
    - "timm:NAME" or "torch:NAME": any other model of timm or torchvision (library_model.py).

    Mean and std of the pixels are those that the file, or JSON files beside it, state; else those of its kind
    (pixels.py). A note says which, and why. ``normalisation`` "imagenet" or "half" overrides them.

    Raises InputError where the source is unknown, unreachable or unreadable, not finite, or no plain ViT.

    >>> weights = load_weights("dino")
    >>> weights = load_weights("vit_small.safetensors", normalisation="imagenet")
    """
    source = str(source)
    if normalisation not in ("auto", *STATISTICS):
        raise InputError(f"normalisation {normalisation}: expected auto, {' or '.join(STATISTICS)}")
    asked = STATISTICS.get(normalisation)
    if source.startswith(tuple(LIBRARIES)):
        weights = published(source)
        return weights if asked is None else replace(weights, mean=asked[0], std=asked[1])
    file = _find(source, size)
    state = read_vit(file.path, file.label)
    tensors = in_timms_names(file.label, state.tensors)
    architecture = architecture_of(file.label, tensors)
    found = _preprocessing(file, replace(state, tensors=tensors), architecture, asked)
    return Weights(
        tensors,
        architecture,
        found.mean,
        found.std,
        file.label,
        state.sha256,
        interpolation=found.interpolation,
        crop=found.crop,
    )


def _find(source: str, size: str) -> WeightsFile:
    if source not in NAMES and not source.startswith("hf:"):
        candidates = [source, *(os.path.join(source, name) for name in USUAL)]  # noqa: PTH118
        # os.path, since any text may come here; pathlib raises where a name is too long.
        if path := next((Path(path) for path in candidates if os.path.isfile(path)), None):  # noqa: PTH113
            label = path.name if path == Path(source) else f"{path.parent.name}/{path.name}"
            stem = re.sub(rf"({'|'.join(map(re.escape, FILES))})$", "", path.name)
            folder = [path.with_name("preprocessor_config.json"), path.with_name("config.json")]
            return WeightsFile(path, folder, label, own=path.with_name(f"{stem}.json"))
        if source.endswith(FILES):
            raise InputError(f"weights {source}: no such file; give an existing file, a timm model name or none")
    return download(*hub_address(source, size))


def _preprocessing(
    file: WeightsFile, state: StateDict, architecture: Architecture, asked: tuple[Channels, Channels] | None
) -> Preprocessing:
    """Find the pixels' statistics and resizing, and note where they come from; ``asked`` beats what is stated."""
    try:
        own, beside = Beside.read([file.own] if file.own else []), Beside.read(file.configs)
        width, heads = beside.number("hidden_size", "num_features"), beside.number("num_attention_heads")
        elsewhere = ""
        if width not in (None, WIDTH_DEPTH_HEADS[architecture.size][0]):
            elsewhere = f"; {file.configs[-1].name} beside it is of another model (width {width})"
            beside, heads = Beside(()), None
        found = preprocessing(file.label, own, state.metadata, beside, state.names, state.tensors)
    except InputError:
        if asked is None:
            raise
        return Preprocessing(*asked)
    _refuse_other_heads(file.label, state.names, architecture, heads)
    if asked is not None:
        return replace(found, mean=asked[0], std=asked[1])
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (found.mean, found.std))
    note(
        "weights",
        f"{file.label}: pixels are normalised by mean {mean} and deviation {std}, by {found.why}{elsewhere}; "
        "normalisation imagenet or half overrides that",
    )
    return found


def _refuse_other_heads(label: str, names: tuple[str, ...], architecture: Architecture, stated: int | None) -> None:
    """Refuse weights of another number of attention heads, which no shape shows."""
    moco = any("base_encoder." in name or "momentum_encoder." in name for name in names)
    theirs = 12 if moco and architecture.size == "small" else stated  # arXiv 2104.02057, section 4.1
    if theirs not in (None, architecture.heads):
        raise InputError(
            f"weights {label}: a ViT with {theirs} attention heads, but {architecture} has {architecture.heads} here, "
            "which would compute something else; give a plain ViT, or timm:NAME"
        )


def architecture_of(label: str, tensors: Mapping[str, Tensor]) -> Architecture:
    """Read the architecture off the shapes; the image size is the one that the position embedding is for.

    Raises InputError where the tensors, named as timm's, are none of a plain ViT, or hold less than its shapes say.

    >>> architecture_of("vit.safetensors", load_file("vit.safetensors"))
    """
    _refuse_other_kinds(label, tensors)
    ranks = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    ranks |= {name: rank for name, rank in {"head.weight": 2, "reg_token": 3}.items() if name in tensors}
    for name, rank in ranks.items():
        if name not in tensors or tensors[name].ndim != rank or 0 in tensors[name].shape:
            head = f"weights {label}: no {name} of {rank} dimensions among its {len(tensors)} tensors"
            raise refusal(head, some_names(list(tensors)), OUR_NAMES)
    width = tensors["cls_token"].shape[2]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    size = next((s for s, (w, d, _) in WIDTH_DEPTH_HEADS.items() if (w, d) == (width, depth)), None)
    if size is None:
        known = ", ".join(f"{s} {w} and {d}" for s, (w, d, _) in WIDTH_DEPTH_HEADS.items())
        raise InputError(f"weights {label}: width {width} and depth {depth} are no known size; give {known}")
    grid, class_position = _grid(label, tuple(tensors["pos_embed"].shape), width)
    patch_size = tensors["patch_embed.proj.weight"].shape[3]
    _check_holds(label, tensors, width, depth)
    return Architecture(
        size,
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_classes=len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        registers=tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        layer_scale=any(".ls1." in name for name in tensors),
        class_position=class_position,
    )


def _check_holds(label: str, tensors: Mapping[str, Tensor], width: int, depth: int) -> None:
    """Refuse a few small tensors that would stand for a large model, before it is made."""
    patch = tensors["patch_embed.proj.weight"].shape[3]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    if "head.weight" in shapes:
        expected["head.weight"] = (shapes["head.weight"][0], width)
    if "reg_token" in shapes:
        expected["reg_token"] = (1, shapes["reg_token"][1], width)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(
                f"weights {label}: 1 misshapen ({name} {shapes[name]} instead of {shape}); {_INSTEAD}, or weights none"
            )
    numbers = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("blocks."))
    if numbers < 6 * width**2 * depth:  # half of what the four linear layers of each block hold
        raise InputError(
            f"weights {label}: {depth} blocks of width {width}, in which most tensors are missing; {_INSTEAD}"
        )


def _refuse_other_kinds(label: str, tensors: Mapping[str, Tensor]) -> None:
    found = [words for part, words in _UNSUPPORTED_PARTS.items() if any(part in name for name in tensors)]
    into, out_of = (tensors.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    if into is not None and out_of is not None and into.dim() == out_of.dim() == 2:
        found += [_GATED] if len(into) == 2 * out_of.shape[1] else []  # as timm packs it
    if found:
        raise InputError(f"weights {label}: a ViT with {found[0]}, which is not supported here; {_INSTEAD}")
    absent = [words for name, words in _NEEDED_PARTS.items() if name not in tensors]
    if len(absent) == 1 and "patch_embed.proj.weight" in tensors:
        raise InputError(f"weights {label}: a ViT without {absent[0]}, which this model needs; {_INSTEAD}")


def _grid(label: str, shape: tuple[int, ...], width: int) -> tuple[int, bool]:
    """Find the patches a side, and if the class token has a position too: no two squares above 0 differ by 1."""
    for prefix in (1, 0):
        grid = math.isqrt(max(shape[1] - prefix, 0))
        if grid > 0 and shape == (1, prefix + grid**2, width):
            return grid, bool(prefix)
    raise InputError(
        f"weights {label}: expected a position embedding (1, 1 + a square, {width}), got {shape}; "
        "give weights made for square images"
    )
