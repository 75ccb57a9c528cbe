"""TorchScript: one file that torch opens without any code of ours."""

import io
import warnings
from collections.abc import Sequence

import torch

from fedtalos.models.backbone import Backbone
from fedtalos.models.export.pixels import as_json, for_transformers


def torchscript_files(model: Backbone, classes: Sequence[str]) -> dict[str, bytes]:
    """Make model.pt, which maps normalised images (B, 3, S, S) to logits (B, C) for any B.

    Classes and the preparation of images are in the file under extra/config.json, and in preprocessor_config.json
    beside it.

    >>> sorted(torchscript_files(model, ("cat", "dog")))
    ['model.pt', 'preprocessor_config.json']
    """
    size, pixels = model.architecture.image_size, for_transformers(model)
    images = torch.linspace(-1, 1, 2 * 3 * size**2).view(2, 3, size, size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch calls its format old; people still use it
        traced = torch.jit.trace(model, images, check_trace=False)
        saved = io.BytesIO()
        config = as_json({"classes": list(classes), **pixels}).decode()
        torch.jit.save(traced, saved, _extra_files={"config.json": config})
    return {"model.pt": saved.getvalue(), "preprocessor_config.json": as_json(pixels)}
