"""Masks on disk (safetensors, one bit per entry, by tensor name) and what they look like per block and kind."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from torch import Tensor, nn

from fedtalos.errors import InputError
from fedtalos.files import write_atomic

Mask = dict[str, Tensor]
"""Tensor name -> bool tensor of the parameter's shape; True = may move."""

KINDS = ("q", "k", "v", "proj", "fc1", "fc2", "norms", "biases")
_HEADER = "fedtalos_mask"


class MaskFacts(BaseModel):
    """How a mask was made; stored in its header."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    version: str
    criterion: str
    fisher: str
    iterations: int
    target_density: float
    eligible: int
    active: int
    soft_zero: float
    calibration_images: int
    seed: int
    model: dict[str, str | int]
    weights: str
    data: str
    head: str

    @property
    def density(self) -> float:
        """Density reached: True entries per eligible entry."""
        return self.active / self.eligible


def save_mask(path: Path, mask: Mask, facts: MaskFacts) -> None:
    """Write a mask file, one bit per entry."""
    shapes = {name: list(tensor.shape) for name, tensor in mask.items()}
    header = json.dumps({"facts": facts.model_dump(), "shapes": shapes})
    bits = {name: np.packbits(tensor.cpu().numpy().reshape(-1)) for name, tensor in mask.items()}
    write_atomic(path, save_safetensors(bits, metadata={_HEADER: header}))


def load_mask(path: Path) -> tuple[Mask, MaskFacts]:
    """Read a mask file.

    Raises InputError where the file is missing, broken or not a mask.
    """
    if not path.is_file():
        raise InputError(f"mask {path}: no such file; `fedtalos editing` writes one under masks/")
    content = path.read_bytes()
    try:
        bits = load_safetensors(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_HEADER])
        shapes: dict[str, list[int]] = header["shapes"]
        facts = MaskFacts(**header["facts"])
        mask = {
            name: torch.from_numpy(np.unpackbits(bits[name], count=int(np.prod(shape))).astype(bool).reshape(shape))
            for name, shape in shapes.items()
        }
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"mask {path}: not a readable fedtalos mask file; make it anew with `fedtalos editing`"
        ) from error
    if sum(int(tensor.sum()) for tensor in mask.values()) != facts.active:
        raise InputError(f"mask {path}: holds other bits than its header says; make it anew with `fedtalos editing`")
    return mask, facts


def check_mask(
    path: Path, mask: Mask, facts: MaskFacts, model: nn.Module, architecture: Mapping[str, str | int]
) -> None:
    """Refuse a mask made for another model: size, patch, tensor names and shapes are compared."""
    for key in ("size", "patch_size"):
        if facts.model.get(key) != architecture[key]:
            raise InputError(
                f"mask {path}: made for {key} {facts.model.get(key)}, this model has {architecture[key]}; "
                "give the model that the mask was made for, or make a mask for this one"
            )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, tensor in mask.items():
        found = shapes.get(name, "no such tensor")
        if found != tuple(tensor.shape):
            raise InputError(
                f"mask {path}: {name} has shape {tuple(tensor.shape)}, this model has {found}; "
                "make a mask for this model with `fedtalos editing`"
            )


def fingerprint(mask: Mask) -> str:
    """A digest of the mask's bits and names, whatever its file says."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(mask.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(np.packbits(tensor.cpu().numpy().reshape(-1)).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class DensityRow:
    """True entries and entries of one kind of tensor in one block."""

    block: int
    kind: str
    active: int
    entries: int

    @property
    def density(self) -> float:
        return self.active / self.entries


def density_table(mask: Mask) -> list[DensityRow]:
    """Density per block and kind (q, k, v, proj, fc1, fc2: weights; norms: both; biases: of the linear layers)."""
    totals: dict[tuple[int, str], list[int]] = {}
    for name, tensor in mask.items():
        _, block, layer = name.split(".", 2)
        for kind, part in _kinds(layer, tensor):
            row = totals.setdefault((int(block), kind), [0, 0])
            row[0] += int(part.sum())
            row[1] += part.numel()
    ordered = sorted(totals, key=lambda key: (key[0], KINDS.index(key[1])))
    return [DensityRow(block, kind, *totals[block, kind]) for block, kind in ordered]


def _kinds(layer: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if layer.startswith("norm"):
        return [("norms", tensor)]
    if layer.endswith(".bias"):
        return [("biases", tensor)]
    if layer == "attn.qkv.weight":
        return list(zip("qkv", tensor.chunk(3), strict=True))
    return [(layer.split(".")[1], tensor)]


def overlap(first: Mask, second: Mask) -> float:
    """Intersection over union of two masks' True entries (1 where both are empty)."""
    if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in second.items()}:
        raise InputError("masks: made for different models, so their overlap has no meaning")
    both = sum(int((first[name] & second[name]).sum()) for name in first)
    either = sum(int((first[name] | second[name]).sum()) for name in first)
    return both / either if either else 1.0
