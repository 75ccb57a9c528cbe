"""State dicts, read from safetensors and torch files: plain tensors only, float32 and finite."""

import argparse
import hashlib
import io
import mmap
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedtalos.errors import InputError, shortened
from fedtalos.facts import MOST_HEADER, check_fits
from fedtalos.models.weights.wrappers import flat, inner_vit

MOST_PICKLED = 2**22
"""Bytes of the pickle in a torch file, which says what its tensors are; that of a large ViT's training has 300 000."""
MOST_READS = 10**6
"""Steps of the pickle in a torch file of the older kind, which nothing sets apart from its tensors."""
_MAKES_MORE = (b"bytearray", b"_rebuild_device_tensor", b"_rebuild_nested_tensor", b"_rebuild_wrapper_subclass")
"""Functions that torch lets a pickle call, and that make much of a few numbers."""
_COPIES = b"_codecs"
"""Another one: it copies a text; with as many as 64 KiB of pickle it makes 130 MB at most."""


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
    size = check_fits(path, f"weights {label}", times=2)  # the file, and its tensors in float32
    content, metadata = _content(path)
    found = flat(label, content)
    if not found:
        what = "no tensor in it" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"weights {path}: expected tensors by name, got {what}; save a state dict")
    _check_numbers(label, found, size)
    tensors = _checked(label, inner_vit(label, found).items())
    return StateDict(tensors, metadata, _sha256(path), tuple(found))


def read_state_dict(path: Path, label: str, *, floats_only: bool = False) -> StateDict:
    """Read the tensors of any model as its library names them; ``label`` is their name in messages.

    With ``floats_only`` integers are left out.

    Raises InputError where the file is torn, holds more than tensors, or one that is not finite.

    >>> state = read_state_dict(Path("convnext.safetensors"), "convnext.safetensors")
    """
    size = check_fits(path, f"weights {label}", times=2)
    content, metadata = _content(path)
    if isinstance(content, dict):
        key = next((key for key in ("state_dict", "model") if isinstance(content.get(key), dict)), None)
        content = content if key is None else content[key]
    if not isinstance(content, dict):
        raise InputError(f"weights {path}: expected tensors by name, got a {type(content).__name__}; save a state dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            shown_name = shortened(name, 80) if isinstance(name, str) else f"a {type(name).__name__}"
            raise InputError(f"weights {path}: {shown_name} is no tensor by name; save a state dict alone")
    _check_numbers(label, content, size)
    named = ((str(name).removeprefix("module."), tensor) for name, tensor in content.items())
    tensors = _checked(label, (pair for pair in named if not floats_only or pair[1].is_floating_point()))
    return StateDict(tensors, metadata, _sha256(path), tuple(tensors))


def _content(path: Path) -> tuple[Any, Mapping[str, str]]:
    """Read a file by what is in it, since its ending may be any: a safetensors file has a JSON header at byte 8."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":
            if int.from_bytes(start[:8], "little") > MOST_HEADER:
                raise _ExcessiveError("a header of absurd length")
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if "/" not in name}  # noqa: SIM118
                return tensors, file.metadata() or {}
        return _of_torch(path), {}
    except Exception as error:  # a torn or hostile file makes either reader raise anything
        object_ = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
        why = f"it pickles a {object_[1]}" if object_ else type(error).__name__
        why = str(error) if isinstance(error, _ExcessiveError) else why
        raise InputError(
            f"weights {shortened(str(path), 120)}: neither a whole safetensors file nor a torch state dict of plain "
            f"tensors ({why}); fetch it again, or save the state dict alone with torch.save"
        ) from error


class _ExcessiveError(ValueError):
    """A file asks for far more than it holds; the message says by what."""


class _Steps(io.BufferedReader):
    """A file that a pickle is read from, step by step, as far as MOST_READS."""

    steps = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.steps += 1
        if self.steps > MOST_READS:
            raise _ExcessiveError("a pickle of absurd length")
        return super().read(size)


def _of_torch(path: Path) -> Any:
    """Read a torch file; _ExcessiveError where it is packed, or asks for what would be far larger than itself."""
    # DINO keeps its options beside the tensors.
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    with allowed, _Steps(io.FileIO(path)) as file, warnings.catch_warnings(action="ignore"):  # of sparse tensors, say
        if zipfile.is_zipfile(path):
            _check_zip(path)
            return torch.load(path, map_location="cpu", weights_only=True)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_calls(content, of_older_kind=True)
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _ExcessiveError("packed, so that it may be larger than it looks")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise _ExcessiveError("members that lie in each other")
        for member in members:
            if member.filename.endswith(".pkl"):
                if member.file_size > MOST_PICKLED:
                    raise _ExcessiveError("a pickle of absurd length")
                _check_calls(archive.read(member))


def _check_calls(content: bytes | mmap.mmap, *, of_older_kind: bool = False) -> None:
    names = (*_MAKES_MORE, _COPIES) if of_older_kind or len(content) > 2**16 else _MAKES_MORE
    if any(content.find(name) >= 0 for name in names):
        raise _ExcessiveError("asks for objects that are no tensors")


def _check_numbers(label: str, tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors that hold more numbers in all than the file has bytes: views of each other, or of one number."""
    numbers = 0
    for name, tensor in tensors.items():
        if tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested:
            _check_whole(label, name, tensor)
            numbers += tensor.numel()
    if numbers > size:
        raise InputError(
            f"weights {label}: tensors of {numbers} numbers in a file of {size} bytes, so many are the same; "
            "save a copy of each (tensor.clone())"
        )


def _check_whole(label: str, name: str, tensor: Tensor) -> None:
    if tensor.is_nested or tensor.nbytes > tensor.untyped_storage().nbytes():  # one number may stand for billions
        raise InputError(
            f"weights {label}: {shortened(name, 80)} is a view of fewer numbers; save a copy of it (tensor.clone())"
        )


def _checked(label: str, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _as_float32(label, name, tensor) for name, tensor in named}


def _as_float32(label: str, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"weights {label}: {name} is {tensor.dtype}; give weights in float32, float16 or bfloat16")
    _check_whole(label, name, tensor)
    tensor = tensor.detach().to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise InputError(f"weights {label}: {name} holds NaN or infinity; give weights of a run that did not diverge")
    return tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
