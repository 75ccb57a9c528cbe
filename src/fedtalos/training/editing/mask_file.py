"""Masks on disk (safetensors, one bit per entry, by tensor name) and what they look like per block and kind."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from torch import Tensor, nn

from fedtalos.errors import InputError, shown
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.models.vision_transformer import parts
from fedtalos.training.editing.talos import Eligible, eligible_masks

Mask = dict[str, Tensor]
"""Tensor name -> bool tensor of the parameter's shape; True = may move."""

JoinRule = Literal["union", "intersection", "majority", "vote"]

FORMAT = 3
KINDS = ("q", "k", "v", "proj", "fc1", "fc2", "linear", "conv", "norms", "biases")
_HEADER = "fedtalos_mask"
_NAMES = re.compile(r"net\..+|blocks\.[0-9]+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)")


class MaskFacts(BaseModel):
    """How a mask was made; stored in its header. Of a joined mask: what its sources agree on, else several or None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    version: str
    criterion: str
    fisher: str  # the mode, or none
    fisher_samples: int | None  # labels drawn per image and iteration
    iterations: int | None
    granularity: str
    eligible_in: Eligible
    eligible: int
    active: int
    target_density: float | None
    soft_zero: float | None
    calibration: str
    clients: int | None
    calibration_images: int | None
    seed: int | None
    model: dict[str, str | int]
    weights: str
    data: str
    head: str
    made_from: tuple[str, ...] = ()  # fingerprints of the masks that it joins, or is drawn like

    @property
    def density(self) -> float:
        """Density reached: True entries per eligible entry."""
        return self.active / self.eligible


def save_mask(path: Path, mask: Mask, facts: MaskFacts) -> None:
    """Write a mask file, one bit per entry, sealed."""
    shapes = {name: list(tensor.shape) for name, tensor in mask.items()}
    header = json.dumps({"seal": UNSEALED, "facts": facts.model_dump(), "shapes": shapes})
    bits = {name: np.packbits(tensor.cpu().numpy().reshape(-1)) for name, tensor in mask.items()}
    write_atomic(path, sealed(save_safetensors(bits, metadata={_HEADER: header})))


def load_mask(path: Path) -> tuple[Mask, MaskFacts]:
    """Read a mask file.

    Raises InputError where the file is missing, not what was written, or not a mask.
    """
    if not path.is_file():
        raise InputError(f"mask {path}: no such file; `fedtalos editing` writes one under masks/")
    content = path.read_bytes()
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_HEADER])
        if (made_in := header["facts"]["format"]) != FORMAT:
            raise InputError(f"mask {path}: format {shown(made_in)}, this version reads {FORMAT}; make it anew")
        if not is_sealed(content):
            raise InputError(f"mask {path}: not what was written (checksum); make it anew with `fedtalos editing`")
        return _checked(load_safetensors(content), header["shapes"], MaskFacts(**header["facts"]))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"mask {path}: not a readable fedtalos mask file; make it anew with `fedtalos editing`"
        ) from error


def _checked(
    bits: Mapping[str, NDArray[np.uint8]], shapes: Mapping[str, list[int]], facts: MaskFacts
) -> tuple[Mask, MaskFacts]:
    """The mask of these bits; ValueError or TypeError where they are not what shapes and facts say.

    A seal says that nothing changed, not that what wrote it meant well.
    """
    mask = {name: _unpacked(bits[name], shape) for name, shape in shapes.items()}
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, facts.eligible_in)
    if eligible.keys() != mask.keys() or not all(map(_NAMES.fullmatch, mask)):
        raise ValueError("other tensors")
    if sum(int(tensor.sum()) for tensor in mask.values()) != facts.active or facts.eligible < max(facts.active, 1):
        raise ValueError("other bits")
    words = [*facts.model_dump().values(), *facts.model, *facts.model.values(), *facts.made_from]
    if not "".join(map(str, words)).isprintable():
        raise ValueError("words that a terminal would act on")
    return mask, facts


def _unpacked(bits: NDArray[np.uint8], shape: list[int]) -> Tensor:
    if not (shape and all(isinstance(side, int) and side > 0 for side in shape)):
        raise ValueError("a shape that no tensor has")
    count = math.prod(shape)
    if bits.dtype != np.uint8 or bits.size != -(-count // 8):  # else numpy pads with zeros
        raise ValueError("a shape that is not that of the bits")
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool).reshape(shape))


def check_mask(
    path: Path,
    mask: Mask,
    facts: MaskFacts,
    model: nn.Module,
    *,
    architecture: Mapping[str, str | int],
    weights: str,
    force: bool,
) -> None:
    """Refuse a mask made for another model or other weights, saying what differs.

    ``force`` takes every mask that fits in names and shapes.
    """
    differs = origin_differs([facts, facts.model_copy(update={"model": architecture, "weights": weights})])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, tensor in mask.items():
        if (found := shapes.get(name, "no such tensor")) != tuple(tensor.shape):
            raise InputError(
                f"mask {path}: made for another model than this ({differs or 'names'}): {name} has shape "
                f"{tuple(tensor.shape)}, here {found}; give the model that it was made for, or make a mask for this "
                "with `fedtalos editing`"
            )
    if differs and not force:
        raise InputError(
            f"mask {path}: not made for this: {differs} (the mask's first); give what it was made for, make a mask for "
            "this with `fedtalos editing`, or add --force_mask"
        )


def origin_differs(headers: Sequence[MaskFacts]) -> str:
    """In what masks' models and weights differ, with all values; empty where they are the same."""
    origins = [{**facts.model, "weights": facts.weights} for facts in headers]
    found = {
        what: list(dict.fromkeys(str(origin.get(what)) for origin in origins))
        for what in ("name", "size", "patch_size", "weights")
    }
    return "; ".join(f"{what} {' / '.join(values)}" for what, values in found.items() if len(values) > 1)


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


def density_table(mask: Mask, eligible_in: Eligible) -> list[DensityRow]:
    """Density per block and kind (q, k, v, proj, fc1, fc2: weights; norms: both; biases: of the linear layers).

    Only eligible entries count, and kinds that have some. Of a foreign model: linear, conv, norms and biases, and as
    blocks, in their order, what shares a name up to the last number in it.
    """
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, eligible_in)
    totals: dict[tuple[int, str], list[int]] = {}
    units: dict[str, int] = {}
    for name, tensor in mask.items():
        ours = name.startswith("blocks.")
        block = int(name.split(".")[1]) if ours else units.setdefault(_unit(name), len(units))
        kind = _kind(name) if ours else _foreign_kind(name, mask)
        for part, chosen in parts(name, tensor).items():
            row = totals.setdefault((block, kind if kind in ("norms", "biases") else part or kind), [0, 0])
            row[0] += int(chosen.sum())
            row[1] += int(parts(name, eligible[name])[part].sum())
    ordered = sorted(totals, key=lambda key: (key[0], KINDS.index(key[1])))
    return [DensityRow(block, kind, *totals[block, kind]) for block, kind in ordered if totals[block, kind][1]]


def _kind(name: str) -> str:
    """Of blocks.N.norm1.weight, blocks.N.mlp.fc1.weight and the like."""
    layer = name.split(".", 2)[2]
    return "norms" if layer.startswith("norm") else "biases" if layer.endswith(".bias") else layer.split(".")[1]


def _foreign_kind(name: str, mask: Mask) -> str:
    weight = mask.get(name.removesuffix("bias") + "weight") if name.endswith(".bias") else mask[name]
    if weight is not None and weight.dim() == 1:
        return "norms"
    return "biases" if name.endswith(".bias") else "conv" if mask[name].dim() == 4 else "linear"


def _unit(name: str) -> str:
    """A layer's path up to its last number but its own: net.stages.1.blocks.2 of net.stages.1.blocks.2.mlp.fc1.bias."""
    found = re.match(r".*\d(?=\.)", name.rsplit(".", 2)[0] + ".")
    return found[0] if found else ""


def overlap(first: Mask, second: Mask) -> float:
    """Intersection over union of two masks' True entries (1 where both are empty); a tensor not there is all False.

    Raises InputError where tensors of one name differ in shape.
    """
    shared = first.keys() & second.keys()
    if any(first[name].shape != second[name].shape for name in shared):
        raise InputError("masks: made for different models, so their overlap has no meaning")
    both = sum(int((first[name] & second[name]).sum()) for name in shared)
    either = sum(int(tensor.sum()) for mask in (first, second) for tensor in mask.values()) - both
    return both / either if either else 1.0


def check_same_tensors(masks: Sequence[Mask]) -> None:
    """InputError where masks do not speak of the same tensors."""
    shapes = [{name: tensor.shape for name, tensor in mask.items()} for mask in masks]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError("masks: made for different models or eligible tensors, so they cannot be joined")


def votes_needed(rule: JoinRule, masks: int, quorum: float) -> int:
    """How many of so many masks must let an entry move for the joined mask to let it."""
    return {
        "union": 1,
        "intersection": masks,
        "majority": masks // 2 + 1,
        "vote": max(1, math.ceil(quorum * masks - 1e-9)),  # 0.7 x 10 is a little above 7
    }[rule]
