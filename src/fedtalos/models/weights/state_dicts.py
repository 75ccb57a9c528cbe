"""State dicts, read from safetensors and torch files: plain tensors only, float32 and finite."""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedtalos.errors import InputError

_PRETRAINING_HEADS = ("head.mlp.", "head.last_layer.", "dino_head.", "ibot_head.")
"""Parts of DINO's and DINOv2's teachers beside the ViT."""


@dataclass(frozen=True)
class StateDict:
    """A file's tensors by name, float32 on the CPU.

    >>> read_state_dict(Path("vit.safetensors"), "vit.safetensors").tensors["cls_token"].shape
    torch.Size([1, 1, 192])
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]
    """Metadata of a safetensors file; empty for a torch file."""
    sha256: str
    """Checksum of the file."""


def read_state_dict(path: Path, label: str, *, floats_only: bool = False) -> StateDict:
    """Read the tensors of a model; ``label`` is their name in messages.

    Prefixes of wrappers (module., backbone.) are dropped. Names with a "/" (optimiser state in our checkpoints) are
    left out, with ``floats_only`` integers too.

    Raises InputError where the file is torn, holds more than tensors, or one that is not finite.

    >>> state = read_state_dict(Path("vit.safetensors"), "vit.safetensors")
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
    with path.open("rb") as file:
        return StateDict(tensors, metadata, hashlib.file_digest(file, "sha256").hexdigest())


def _content(path: Path) -> tuple[Any, Mapping[str, str]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if "/" not in name}  # noqa: SIM118
                return tensors, file.metadata() or {}
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its options beside the tensors
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
