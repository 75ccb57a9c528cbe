"""Masks on disk: safetensors, one bit per entry, by tensor name, with facts of how the mask was made."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.facts import (
    MOST_HEADER,
    Shapes,
    Versioned,
    Word,
    check_version,
    open_schema,
    read_facts,
    read_file,
    refusal,
    schema,
)
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.models.backbone import Backbone
from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS
from fedtalos.tensor_file import metadata_of, read_arrays
from fedtalos.training.editing.eligible import Eligible, eligible_masks
from fedtalos.training.editing.mask_facts import FORMAT, MaskFacts, facts_of, origin_differs
from fedtalos.training.entries import Mask

MOST_ENTRIES = 2**29
"""Entries of a mask that is read, a byte each in memory; the largest ViT here has 303 million."""

_HEADER = "fedtalos_mask"
_IN_BLOCKS = r"blocks\.[0-9]+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])"
_NAMES = re.compile(rf"net\..+|(patch_embed\.proj|norm|{_IN_BLOCKS})\.(weight|bias)")


@open_schema
@dataclass(frozen=True)
class _AnyHeader:
    """A header of any version."""

    facts: Versioned


@schema
@dataclass(frozen=True)
class _Header:
    """Facts that a file states: what the mask is, and which tensors it is of."""

    seal: Word
    facts: MaskFacts
    shapes: Shapes


def save_mask(path: Path | str, mask: Mask, model: Backbone, *, criterion: str = "given") -> None:
    """Write a mask of a model to a file, one bit per entry.

    The file says for which weights the mask is; ``criterion`` says in a few words how it was made. Raises InputError
    where the mask names other tensors or entries than the model's eligible ones.

    >>> save_mask("masks/mine.safetensors", mask, model, criterion="talos")
    """
    write_mask_file(Path(path), mask, facts_of(mask, model, criterion))


def load_mask(path: Path | str, model: Backbone, *, force_mask: bool = False) -> Mask:
    """Read a mask that is to be used with this model.

    Raises InputError where the file is missing, not what was written or no mask, where the mask does not fit the model,
    and unless ``force_mask`` where it was made for another model or for other weights.

    >>> mask = load_mask("masks/mine.safetensors", model)
    """
    mask, facts = read_mask_file(Path(path))
    check_mask(Path(path), mask, facts, model, force=force_mask)
    return mask


def write_mask_file(path: Path, mask: Mask, facts: MaskFacts) -> None:
    """Write a mask file, one bit per entry, sealed."""
    shapes = {name: list(tensor.shape) for name, tensor in mask.items()}
    header = json.dumps({"seal": UNSEALED, "facts": asdict(facts), "shapes": shapes})
    write_atomic(path, sealed(save_safetensors(packed(mask), metadata={_HEADER: header})))


def read_mask_file(path: Path) -> tuple[Mask, MaskFacts]:
    """Read a mask file, whatever model it is for.

    Raises InputError where the file is missing, not what was written, or not a mask.

    >>> mask, facts = read_mask_file(Path("masks/mine.safetensors"))
    >>> facts.density
    0.1
    """
    if not path.is_file():
        raise InputError(f"mask {path}: no such file; `fedtalos editing` writes one under masks/")
    broken, advice = f"mask {path}: not a readable fedtalos mask file", "make it anew with `fedtalos editing`"
    content = read_file(path, f"mask {path}", most=MOST_ENTRIES // 8 + MOST_HEADER, advice=advice)
    text = metadata_of(content, _HEADER, broken, advice)
    check_version(read_facts(_AnyHeader, text, broken, advice).facts, FORMAT, f"mask {path}")
    if not is_sealed(content):
        raise InputError(f"mask {path}: not what was written (checksum); {advice}")
    header = read_facts(_Header, text, broken, advice)
    try:
        return _checked(read_arrays(content, broken, advice), header.shapes, header.facts), header.facts
    except (KeyError, TypeError, ValueError) as error:
        raise refusal(broken, str(error) if type(error) is ValueError else "tensors are missing", advice) from error


def _checked(bits: Mapping[str, NDArray[np.uint8]], shapes: Mapping[str, tuple[int, ...]], facts: MaskFacts) -> Mask:
    """The mask of these bits; ValueError where they are not what shapes and facts say.

    A seal says that nothing changed, not that whoever wrote it meant well. So the shapes must be those of the model
    that the facts name, and few enough, before any tensor is made.
    """
    if sum(map(math.prod, shapes.values())) > MOST_ENTRIES or not all(map(_NAMES.fullmatch, shapes)):
        raise ValueError("other tensors")
    known = _vit_shapes(facts.model)
    if "name" not in facts.model and not shapes.items() <= known.items():
        raise ValueError("tensors of another model than it says")
    mask, eligible = {}, 0
    for name, shape in shapes.items():
        tensor = mask[name] = unpacked(bits[name], shape)
        allowed = eligible_masks({name: tensor.shape}, facts.eligible_in).get(name)
        if allowed is None or bool((tensor & ~allowed).any()):
            raise ValueError("entries that are not eligible")
        eligible += int(allowed.sum())
    if sum(int(tensor.sum()) for tensor in mask.values()) != facts.active or facts.eligible == 0:
        raise ValueError("other bits")
    choices = _count_eligible(known, facts.eligible_in) if known else facts.eligible  # what nobody knows is believed
    if facts.eligible != choices or facts.eligible < eligible:
        raise ValueError(f"it says {facts.eligible} entries are eligible, which are {choices if known else eligible}")
    return mask


def _vit_shapes(model: Mapping[str, str | int]) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a Vision Transformer's tensors that a mask may be of; empty for another library's model."""
    if (size := model.get("size")) not in WIDTH_DEPTH_HEADS or "name" in model:
        return {}
    width, depth, _ = WIDTH_DEPTH_HEADS[str(size)]
    layers = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    found: dict[str, tuple[int, ...]] = {
        f"blocks.{block}.{layer}": shape for block in range(depth) for layer, shape in layers.items()
    }
    if isinstance(patch := model.get("patch_size"), int):  # else several
        found["patch_embed.proj"] = (width, 3, patch, patch)
    found["norm"] = (width,)
    weights = {f"{layer}.weight": shape for layer, shape in found.items()}
    return weights | {f"{layer}.bias": shape[:1] for layer, shape in found.items()}


def _count_eligible(shapes: Mapping[str, tuple[int, ...]], which: Eligible) -> int:
    """Count the eligible entries of these tensors, one tensor after the other; blocks are alike."""
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    total = 0
    for name, shape in shapes.items():
        if name.startswith("blocks.0.") or not name.startswith("blocks."):
            found = eligible_masks({name: torch.Size(shape)}, which).get(name)
            total += 0 if found is None else int(found.sum()) * (depth if name.startswith("blocks.") else 1)
    return total


def packed(mask: Mask) -> dict[str, NDArray[np.uint8]]:
    """A mask's bits, eight in a byte, by tensor name."""
    return {name: np.packbits(tensor.cpu().numpy().reshape(-1)) for name, tensor in mask.items()}


def unpacked(bits: NDArray[np.uint8], shape: Sequence[int]) -> Tensor:
    """The bool tensor of these bits; ValueError where they are not as many as the shape, of sides above 0, says."""
    if not shape:
        raise ValueError("a shape that no tensor has")
    count = math.prod(shape)
    if bits.dtype != np.uint8 or bits.size != -(-count // 8):  # else numpy pads with zeros
        raise ValueError("a shape that is not that of the bits")
    return torch.from_numpy(np.unpackbits(bits, count=count).view(bool).reshape(shape))


def check_mask(path: Path, mask: Mask, facts: MaskFacts, model: Backbone, *, force: bool = False) -> None:
    """Refuse a mask made for another model or other weights, saying what differs.

    ``force`` takes every mask that fits in names and shapes.
    """
    here = replace(facts, model=model.architecture.as_dict(), weights=model.origin.fingerprint)
    differs = origin_differs([facts, here])
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
            "this with `fedtalos editing`, or add force_mask"
        )
