"""State dicts out of safetensors and torch files: plain tensors only, float32 and finite."""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedtalos.errors import InputError

_PRETRAINING_HEADS = ("head.mlp.", "head.last_layer.", "dino_head.", "ibot_head.")
"""What DINO's and DINOv2's teachers hold beside the ViT."""


def read_tensors(path: Path, label: str, *, floats_only: bool = False) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors of the model by plain name, float32, and the safetensors metadata.

    Names with a "/" (optimiser state in our checkpoints) are left out, with ``floats_only`` integers too. Raises
    InputError where the file is torn, holds more than tensors, or one that is not finite.
    """
    content, metadata = _content(path)
    if not isinstance(content, dict):
        raise InputError(f"weights {path}: expected tensors by name, got a {type(content).__name__}; save a state dict")
    key = next((key for key in ("state_dict", "model", "teacher") if isinstance(content.get(key), dict)), None)
    tensors = {}
    for full_name, tensor in (content if key is None else content[key]).items():
        name = str(full_name).removeprefix("module.").removeprefix("backbone.")
        if not isinstance(tensor, Tensor):
            raise InputError(f"weights {path}: {name} is a {type(tensor).__name__}, no tensor; save a state dict alone")
        if floats_only and not tensor.is_floating_point():
            continue
        if "/" not in name and not (key == "teacher" and name.startswith(_PRETRAINING_HEADS)):
            tensors[name] = _as_float32(label, name, tensor)
    return tensors, metadata


def sha256_of(path: Path) -> str:
    """The file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(path: Path) -> tuple[Any, Mapping[str, str]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if "/" not in name}  # noqa: SIM118
                return tensors, file.metadata() or {}
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its options, which do nothing
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # a torn or hostile file makes either reader raise anything
        raise InputError(
            f"weights {path}: neither a whole safetensors file nor a torch state dict of plain tensors "
            f"({type(error).__name__}); fetch it again, or save the state dict alone with torch.save"
        ) from error


def _as_float32(label: str, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"weights {label}: {name} is {tensor.dtype}; give weights in float32, float16 or bfloat16")
    if tensor.is_nested or tensor.nbytes > tensor.untyped_storage().nbytes():  # one number may stand for billions
        raise InputError(f"weights {label}: {name} is a view of fewer numbers; save a copy of it (tensor.clone())")
    tensor = tensor.detach().to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise InputError(f"weights {label}: {name} holds NaN or infinity; give weights of a run that did not diverge")
    return tensor
