"""Pixel statistics and resizing that weights were made for, as their makers state them, or by their kind.

Statements are looked for in this order; the first counts:

1. a JSON file with the weights file's stem: someone wrote it for this file;
2. the weights file's own metadata (our checkpoints);
3. preprocessor_config.json, then config.json, in the same folder, as the Hugging Face hub has them.

Where none states anything, the kind of the weights says it: by what is in the file, and by its name at last.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
from torch import Tensor

from fedtalos.errors import InputError, shortened
from fedtalos.facts import facts_from, open_schema, read_file

Channels = tuple[float, float, float]
"""One number per colour channel, for pixels in 0..1."""
LEAST_CROP = 0.25
Crop = Annotated[float, Interval(ge=LEAST_CROP, le=1)]
"""Share of an image's side that a model sees; for a smaller one, images would be stored at many times their size."""
Interpolation = Literal["bilinear", "bicubic"]
Middle = Annotated[float, Interval(ge=-1e4, le=1e4)]
"""A mean of pixels, as files may state it."""
Width = Annotated[float, Interval(ge=1e-6, le=1e4)]
"""A standard deviation of pixels, as files may state it."""

MOST_BYTES = 2**23
"""Bytes of a JSON file beside weights; one that names 21 000 classes has 1 MB."""
LARGEST_SIDE = 2**20
"""Pixels a side, or tokens' width, that a file may state."""

IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"imagenet": IMAGENET, "half": HALF}
"""Pixel mean and deviation by name."""

_EXPECTED = "expected a JSON object with three numbers each for mean and std"
_MEND = "mend it, or override it with normalisation imagenet or half"

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


@open_schema
@dataclass(frozen=True)
class _Statistics:
    """Mean and deviation by channel, as files state them."""

    mean: tuple[Middle, Middle, Middle]
    std: tuple[Width, Width, Width]


@dataclass(frozen=True)
class Beside:
    """Values that JSON files beside weights state about the model.

    >>> Beside.read([Path("snapshot/config.json")]).number("hidden_size", "num_features")
    """

    configs: tuple[tuple[Path, Mapping[str, Any]], ...]

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "Beside":
        """Read those that exist; raises InputError where one is no JSON object, or too large for one."""
        there = (path for path in paths if path.is_file())
        return cls(tuple((path, _parsed(str(path), read_file(path, str(path), most=MOST_BYTES))) for path in there))

    def number(self, *keys: str) -> int | None:
        """The first whole number of a likely size under one of these keys."""
        values = (config.get(key) for _, config in self.configs for key in keys)
        return next((value for value in values if type(value) is int and 0 < value < LARGEST_SIDE), None)


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
    for key in _NESTED:
        nested = config.get(key, config)
        if not isinstance(nested, Mapping):
            raise _unusable(where)
        config = nested
    if config.get("do_normalize") is False:
        return Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), *_resizing(config), why=where)
    keys = ("image_mean", "image_std") if "image_mean" in config else ("mean", "std")
    if not any(key in config for key in keys):
        return None
    said = dict(zip(("mean", "std"), map(config.get, keys), strict=True))
    found = facts_from(_Statistics, said, f"{where}: {_EXPECTED}", _MEND)
    if max(found.mean + found.std) > 1:  # for pixels in 0..255
        found = _Statistics(_scaled(found.mean), _scaled(found.std))
    return Preprocessing(found.mean, found.std, *_resizing(config), why=where)


def _scaled(values: Channels) -> Channels:
    red, green, blue = (value / 255 for value in values)
    return red, green, blue


def _resizing(config: Mapping[str, Any]) -> tuple[Interpolation, float]:
    """Read how images are resized, and the share of each side that is kept; bilinear and all where nothing says."""
    kind = config.get("interpolation", config.get("resample"))
    crop: object = config.get("crop_pct")
    if crop is None and config.get("do_center_crop"):
        side, of = (_side(config.get(key)) for key in ("crop_size", "size"))
        crop = side / of if side and of else None
    share = float(crop) if isinstance(crop, int | float) and LEAST_CROP <= crop <= 1 else 1.0
    return _RESAMPLE.get(kind, "bilinear") if isinstance(kind, int | str) else "bilinear", share


def _side(size: object) -> float | None:
    """Read a size in pixels as transformers writes it: a number, or one by the name of a side."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return float(size) if isinstance(size, int | float) and 0 < size < LARGEST_SIDE else None


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
        (f"{key} {shortened(config[key], 80)} in {path}", config[key][:1000])
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
    return InputError(f"{where}: {_EXPECTED} (above 0); {_MEND}")
