"""Preparation of images for an exported model, in the words of transformers' and timm's files.

Ours scales an image's shorter side to R pixels and keeps the middle square of S, the model's size: R = S / crop.
"""

import json
from typing import Any

from fedtalos.models.backbone import Backbone

PILLOW = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers of resampling filters, as transformers writes them."""


def for_transformers(model: Backbone) -> dict[str, Any]:
    """Make the preprocessor_config.json of a model: resize the shorter side, crop the middle, normalise.

    ViTImageProcessor would squeeze the whole image into a square; BitImageProcessor does what ours does.

    >>> for_transformers(model)["crop_size"]
    {'height': 224, 'width': 224}
    """
    size = model.architecture.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resized(model)},
        "resample": PILLOW[model.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }


def for_timm(model: Backbone) -> dict[str, Any]:
    """Make the part of timm's pretrained_cfg that says how images are prepared.

    >>> for_timm(model)["input_size"]
    [3, 224, 224]
    """
    size = model.architecture.image_size
    return {
        "input_size": [3, size, size],
        "interpolation": model.interpolation,
        "crop_pct": model.crop,
        "crop_mode": "center",
        "mean": list(model.mean),
        "std": list(model.std),
    }


def resized(model: Backbone) -> int:
    """R, pixels of the shorter side before the crop.

    >>> resized(model)
    224
    """
    return int(model.architecture.image_size / model.crop)


def as_json(content: dict[str, Any]) -> bytes:
    """Write a JSON file's bytes, in the given order.

    >>> as_json({"num_classes": 2})
    b'{\\n  "num_classes": 2\\n}\\n'
    """
    return (json.dumps(content, indent=2) + "\n").encode()
