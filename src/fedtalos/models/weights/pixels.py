"""Pixel statistics and resizing that weights were made for, as their makers state them, or by their kind.

Statements are looked for in this order; the first counts:

1. a JSON file with the weights file's stem: someone wrote it for this file;
2. the weights file's own metadata (our checkpoints);
3. preprocessor_config.json, then config.json, in the same folder, as the Hugging Face hub has them.

Where none states anything, the kind of the weights says it: by what is in the file, and by its name at last.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from fedtalos.errors import InputError

Channels = tuple[float, float, float]
"""One number per colour channel, for pixels in 0..1."""
Interpolation = Literal["bilinear", "bicubic"]

IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"imagenet": IMAGENET, "half": HALF}
"""Pixel mean and deviation by name."""

_NESTED = ("pretrained_cfg", "image_processor", "preprocess_cfg")
"""Keys under which timm, transformers and open_clip state them."""

_RESAMPLE: dict[object, Interpolation] = {1: "bicubic", 3: "bicubic", "lanczos": "bicubic", "bicubic": "bicubic"}
"""Pillow's numbers and timm's words; any other is bilinear."""

_EVIDENCE = (
    (r"(^|\.)(dino_head|ibot_head)\.|(^|\.)head\.(mlp|last_layer)\.", "a DINO head"),
    (r"(^|\.)decoder_(blocks|embed)|(^|\.)decoder\.decoder_layers\.", "MAE's decoder"),
    (r"(^|\.)(base_encoder|momentum_encoder)\.", "MoCo's encoders"),
    (r"(^|\.)(dist_token|distillation_token)$|(^|\.)head_dist\.", "DeiT's distillation token"),
    (r"\.(ls[12]\.gamma|gamma_[12]|layer_scale[12]\.lambda1)$", "layer scale (DINOv2, DeiT III)"),
    (r"(^|\.)(register_tokens|reg_token)$", "register tokens (DINOv2)"),
)
"""Names of tensors -> what they show; all of these kinds were trained with ImageNet's statistics."""

_IMAGENET_21K = (21841, 21843)
"""Classes of ImageNet-21k heads, as Google's ViTs (augreg) have them: trained with 0.5."""

_KINDS = (
    (r"dino|deit|(?<![a-z])(mae|moco|msn|ibot|esvit)(v\d|(?![a-z]))", IMAGENET),
    (r"augreg|in21k|google", HALF),
)
"""Parts of names of models -> statistics."""


@dataclass(frozen=True)
class Preprocessing:
    """Statistics of the pixels that weights were trained on, and how images were resized to evaluate them.

    >>> Preprocessing(*HALF, why="vit.json").interpolation
    'bilinear'
    """

    mean: Channels
    std: Channels
    interpolation: Interpolation = "bilinear"
    crop: float = 1.0
    """Share of each side that a middle crop keeps, 0 to 1."""
    why: str = ""
    """The place that states it, or what it was concluded from."""


@dataclass(frozen=True)
class Beside:
    """Values that JSON files beside weights state about the model.

    >>> Beside.read([Path("snapshot/config.json")]).number("hidden_size", "num_features")
    """

    configs: tuple[tuple[Path, Mapping[str, Any]], ...]

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "Beside":
        """Read those that exist; raises InputError where one is no JSON object."""
        return cls(tuple((path, _parsed(str(path), path.read_bytes())) for path in paths if path.is_file()))

    def number(self, *keys: str) -> int | None:
        """The first whole number under one of these keys."""
        values = (config.get(key) for _, config in self.configs for key in keys)
        return next((value for value in values if type(value) is int), None)


def preprocessing(
    label: str,
    own: Beside,
    metadata: Mapping[str, str],
    beside: Beside,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
) -> Preprocessing:
    """Find statistics and resizing; the module's docstring has the order.

    ``own`` is what a JSON file of the weights' stem says, ``beside`` what the folder's files say; ``names`` are those
    of all tensors in the file, ``tensors`` the ViT's.

    Raises InputError where a statement is unusable.

    >>> preprocessing("vit.pth", Beside(()), {}, Beside(()), ["dino_head.mlp.0.weight"], {}).why
    'a DINO head in it'
    """
    in_file = (
        f"the metadata of {label}",
        _parsed(f"metadata of weights {label}", metadata.get("pixels", "{}").encode()),
    )
    statements = [*((str(path), config) for path, config in own.configs), in_file]
    for where, config in [*statements, *((str(path), config) for path, config in beside.configs)]:
        if (found := stated(where, config)) is not None:
            return found
    return _by_content(names, tensors) or _by_names(label, beside)


def stated(where: str, config: Mapping[str, Any]) -> Preprocessing | None:
    """Take what a configuration states, in timm's, transformers' or plain keys; None where it states no statistics.

    Numbers for pixels in 0..255 are turned into those for 0..1.

    Raises InputError where they are unusable.

    >>> stated("config.json", {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9}).crop
    0.9
    """
    try:
        for key in _NESTED:
            config = config.get(key, config)
        if config.get("do_normalize") is False:
            return Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), *_resizing(config), why=where)
        keys = ("image_mean", "image_std") if "image_mean" in config else ("mean", "std")
        if not any(key in config for key in keys):
            return None
        mean, std = ([float(value) for value in config[key]] for key in keys)
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("no three usable numbers")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unusable(where) from error
    if max(mean + std) > 1:  # for pixels in 0..255
        mean, std = ([value / 255 for value in values] for values in (mean, std))
    return Preprocessing(cast(Channels, tuple(mean)), cast(Channels, tuple(std)), *_resizing(config), why=where)


def _resizing(config: Mapping[str, Any]) -> tuple[Interpolation, float]:
    """Read how images are resized, and the share of each side that is kept; bilinear and all where nothing says."""
    kind = config.get("interpolation", config.get("resample"))
    crop: object = config.get("crop_pct")
    if crop is None and config.get("do_center_crop"):
        side, of = (_side(config.get(key)) for key in ("crop_size", "size"))
        crop = side / of if side and of else None
    share = float(crop) if isinstance(crop, int | float) and 0 < crop <= 1 else 1.0
    return _RESAMPLE.get(kind, "bilinear") if isinstance(kind, int | str) else "bilinear", share


def _side(size: object) -> float | None:
    """Read a size in pixels as transformers writes it: a number, or one by the name of a side."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return float(size) if isinstance(size, int | float) and size > 0 else None


def _by_content(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Preprocessing | None:
    for pattern, what in _EVIDENCE:
        if any(re.search(pattern, name) for name in names):
            return Preprocessing(*IMAGENET, why=f"{what} in it")
    head, position = tensors.get("head.weight"), tensors.get("pos_embed")
    if head is not None and head.dim() == 2 and len(head) in _IMAGENET_21K:
        return Preprocessing(*HALF, why=f"a head of {len(head)} classes (Google's ViTs of ImageNet-21k) in it")
    if position is not None and position.dim() == 3 and 0 not in position.shape and not position[0, 0].any():
        return Preprocessing(*IMAGENET, why="a fixed position embedding (MAE, MoCo v3) in it")
    return None


def _by_names(label: str, beside: Beside) -> Preprocessing:
    """Go by what the files beside call the model, then by the weights' own name, then by what is most common."""
    called = [
        (f"{key} {config[key]} in {path}", config[key])
        for path, config in beside.configs
        for key in ("model_type", "architecture", "_name_or_path")
        if isinstance(config.get(key), str)
    ]
    for where, name in [*called, (f"the name {label} alone", label)]:
        for pattern, values in _KINDS:
            if re.search(pattern, name.lower()):
                return Preprocessing(*values, why=where)
    return Preprocessing(*HALF, why="a guess, since nothing in or beside the file says which")


def _parsed(where: str, text: bytes) -> Mapping[str, Any]:
    try:
        config = json.loads(text.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as error:
        raise _unusable(where) from error
    if not isinstance(config, dict):
        raise _unusable(where)
    return config


def _unusable(where: str) -> InputError:
    return InputError(
        f"{where}: expected a JSON object with three numbers each for mean and std (above 0); "
        "mend it, or override it with normalisation imagenet or half"
    )
