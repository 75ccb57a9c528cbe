"""Weights that timm and torchvision publish for their models by name."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn

from fedtalos.errors import InputError
from fedtalos.models.library_model import LibraryArchitecture, bare_model, library
from fedtalos.models.weights import Weights
from fedtalos.models.weights.hub import download
from fedtalos.models.weights.pixels import Preprocessing, stated
from fedtalos.models.weights.state_dicts import read_state_dict


def published(name: str) -> Weights:
    """Fetch the published weights of timm:NAME or torch:NAME, into the hub's cache or torch's.

    Raises InputError where there are none, or they are not to be had.

    >>> published("timm:convnext_atto.d2_in1k").architecture.image_size
    224
    """
    net = bare_model(name)
    return _of_timm(name, net) if name.startswith("timm:") else _of_torchvision(name, net)


def _of_timm(name: str, net: nn.Module) -> Weights:
    config: Any = net.pretrained_cfg
    if not config.get("hf_hub_id") or config.get("custom_load"):
        raise InputError(f"weights {name}: timm has no plain weights for it on the hub; give another model")
    found = download(config["hf_hub_id"], config.get("hf_hub_filename"))
    state = read_state_dict(found.path, found.label)
    # timm reads them itself: it knows old names, and position embeddings for another grid.
    net = library("timm:", "timm").create_model(
        name.removeprefix("timm:"), pretrained=True, num_classes=0, pretrained_cfg_overlay={"state_dict": state.tensors}
    )
    pixels = stated(f"timm's configuration of {name}", config)
    assert pixels is not None
    return _weights(name, net, config["input_size"][-1], pixels, found.label, state.sha256)


def _of_torchvision(name: str, net: nn.Module) -> Weights:
    try:
        weights = library("torch:", "torchvision.models").get_model_weights(name.removeprefix("torch:")).DEFAULT
        transforms = weights.transforms()
        size, mean, std = transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std)
        kind = str(getattr(transforms.interpolation, "value", transforms.interpolation))
        crop = size / transforms.resize_size[0]
    except (ValueError, AttributeError) as error:
        raise InputError(f"weights {name}: torchvision has no ImageNet weights for it ({error})") from error
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if not path.is_file():
        _download(name, weights.url, path)
    state = read_state_dict(path, path.name, floats_only=True)
    missing = net.load_state_dict(state.tensors, strict=False).missing_keys
    if unknown := [parameter for parameter, _ in net.named_parameters() if parameter in missing]:
        raise InputError(f"weights {name}: {path} holds no {unknown[0]}; move it away, and it is fetched again")
    pixels = Preprocessing(mean, std, "bicubic" if kind == "bicubic" else "bilinear", crop)
    return _weights(name, net, size, pixels, path.name, state.sha256)


def _download(name: str, url: str, path: Path) -> None:
    """Fetch into torch's cache; the file's name ends in the first digits of its checksum, which is verified."""
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set, and it is not in the cache")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"weights {name}: {url} could not be fetched ({error}); check the connection, or put the file at {path}"
        ) from error


def _weights(name: str, net: nn.Module, image_size: int, pixels: Preprocessing, source: str, sha256: str) -> Weights:
    tensors = {f"net.{path}": parameter.detach() for path, parameter in net.named_parameters()}  # as LibraryModel's
    return Weights(
        tensors,
        LibraryArchitecture(name, image_size, num_classes=0),
        pixels.mean,
        pixels.std,
        source,
        sha256,
        interpolation=pixels.interpolation,
        crop=pixels.crop,
    )
