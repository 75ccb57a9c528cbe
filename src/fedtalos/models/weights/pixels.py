"""Pixel statistics: mean and deviation of the pixels that weights were trained on, as their makers state them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from fedtalos.errors import InputError

Channels = tuple[float, float, float]
"""One number per colour channel, for pixels in 0..1."""

IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"imagenet": IMAGENET, "half": HALF}
"""Pixel mean and deviation by name."""


def statistics(label: str, configs: Sequence[Path], metadata: Mapping[str, str]) -> tuple[Channels, Channels]:
    """Find mean and std: in the first JSON file that states them, else in safetensors metadata, else by the name.

    ``label`` is the weights' name; one that says dino means ImageNet's, any other 0.5. A missing file states nothing.

    Raises InputError where a statement is unusable.

    >>> statistics("vit_small.dino.safetensors", configs=[], metadata={}) == IMAGENET
    True
    """
    for config in configs:
        if config.is_file() and (stated := _stated(str(config), config.read_text("utf-8", "replace"))) is not None:
            return stated
    stated = _stated(f"metadata of weights {label}", metadata.get("pixels", "{}"))
    return stated or (IMAGENET if "dino" in label.lower() else HALF)


def _stated(where: str, text: str) -> tuple[Channels, Channels] | None:
    """Read mean and std in a JSON object: plain, in transformers' names, or under timm's pretrained_cfg; else None."""
    try:
        config = json.loads(text)
        config = config.get("pretrained_cfg", config)
        keys = ("image_mean", "image_std") if "image_mean" in config else ("mean", "std")
        if not any(key in config for key in keys):
            return None
        mean, std = ([float(value) for value in config[key]] for key in keys)
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("no three usable numbers")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{where}: expected a JSON object with three numbers each for mean and std (above 0); "
            "mend it, or override it with normalisation imagenet or half"
        ) from error
    return cast(Channels, tuple(mean)), cast(Channels, tuple(std))
