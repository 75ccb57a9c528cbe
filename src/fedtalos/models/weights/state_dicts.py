"""State dicts, read from safetensors and torch files: plain tensors only, float32 and finite."""

import argparse
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.weights.wrappers import flat, inner_vit


@dataclass(frozen=True)
class StateDict:
    """A file's tensors by name, float32 on the CPU.

    >>> read_vit(Path("vit.safetensors"), "vit.safetensors").tensors["cls_token"].shape
    torch.Size([1, 1, 192])
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]
    """Metadata of a safetensors file; empty for a torch file."""
    sha256: str
    """Checksum of the file."""
    names: tuple[str, ...] = ()
    """Names of all tensors in the file, those that were left out too."""


def read_vit(path: Path, label: str) -> StateDict:
    """Read the tensors of the ViT that the file holds, however it is wrapped; ``label`` is its name in messages.

    Containers and prefixes are taken off (wrappers.py). Names with a "/" (optimiser state in our checkpoints) and
    counters (integers without dimensions) are left out.

    Raises InputError where the file is torn, holds more than tensors, one that is not finite, or several ViTs.

    >>> state = read_vit(Path("lightning.ckpt"), "lightning.ckpt")
    """
    content, metadata = _content(path)
    found = flat(label, content)
    if not found:
        what = "no tensor in it" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"weights {path}: expected tensors by name, got {what}; save a state dict")
    tensors = _checked(label, inner_vit(label, found).items())
    return StateDict(tensors, metadata, _sha256(path), tuple(found))


def read_state_dict(path: Path, label: str, *, floats_only: bool = False) -> StateDict:
    """Read the tensors of any model as its library names them; ``label`` is their name in messages.

    With ``floats_only`` integers are left out.

    Raises InputError where the file is torn, holds more than tensors, or one that is not finite.

    >>> state = read_state_dict(Path("convnext.safetensors"), "convnext.safetensors")
    """
    content, metadata = _content(path)
    if isinstance(content, dict):
        key = next((key for key in ("state_dict", "model") if isinstance(content.get(key), dict)), None)
        content = content if key is None else content[key]
    if not isinstance(content, dict):
        raise InputError(f"weights {path}: expected tensors by name, got a {type(content).__name__}; save a state dict")
    if other := next((name for name, tensor in content.items() if not isinstance(tensor, Tensor)), None):
        raise InputError(f"weights {path}: {other} is no tensor; save a state dict alone")
    named = ((str(name).removeprefix("module."), tensor) for name, tensor in content.items())
    tensors = _checked(label, (pair for pair in named if not floats_only or pair[1].is_floating_point()))
    return StateDict(tensors, metadata, _sha256(path), tuple(tensors))


def _content(path: Path) -> tuple[Any, Mapping[str, str]]:
    """Read a file by what is in it, since its ending may be any: a safetensors file has a JSON header at byte 8."""
    try:
        with path.open("rb") as file:
            safe = file.read(9)[8:] == b"{"
        if safe:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if "/" not in name}  # noqa: SIM118
                return tensors, file.metadata() or {}
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its options beside the tensors
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # a torn or hostile file makes either reader raise anything
        object_ = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
        why = f"it pickles a {object_[1]}" if object_ else type(error).__name__
        raise InputError(
            f"weights {path}: neither a whole safetensors file nor a torch state dict of plain tensors "
            f"({why}); fetch it again, or save the state dict alone with torch.save"
        ) from error


def _checked(label: str, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _as_float32(label, name, tensor) for name, tensor in named}


def _as_float32(label: str, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"weights {label}: {name} is {tensor.dtype}; give weights in float32, float16 or bfloat16")
    if tensor.is_nested or tensor.nbytes > tensor.untyped_storage().nbytes():  # one number may stand for billions
        raise InputError(f"weights {label}: {name} is a view of fewer numbers; save a copy of it (tensor.clone())")
    tensor = tensor.detach().to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise InputError(f"weights {label}: {name} holds NaN or infinity; give weights of a run that did not diverge")
    return tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
