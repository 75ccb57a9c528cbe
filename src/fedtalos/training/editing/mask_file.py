"""Masks on disk: safetensors, one bit per entry, by tensor name, with facts of how the mask was made."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from torch import Tensor

from fedtalos._version import __version__
from fedtalos.errors import InputError, shown
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.eligible import Eligible, eligible_masks, eligible_shapes
from fedtalos.training.entries import Mask

FORMAT = 3
SEVERAL = "several"
"""Said of a joined mask where its sources disagree; a number is None there."""

_HEADER = "fedtalos_mask"
_IN_BLOCKS = r"blocks\.[0-9]+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])"
_NAMES = re.compile(rf"net\..+|(patch_embed\.proj|norm|{_IN_BLOCKS})\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """Facts of how a mask was made, as its file's header holds them.

    Of a joined mask: what its sources agree on, else "several" or None. None also stands for what nobody knows.
    """

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

    def __post_init__(self) -> None:
        # Files say 1, not true, of a yes or no: an architecture has both.
        plain = {name: int(value) if isinstance(value, bool) else value for name, value in self.model.items()}
        object.__setattr__(self, "model", plain)

    @property
    def density(self) -> float:
        """Density reached: True entries per eligible entry."""
        return self.active / self.eligible


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


def facts_of(mask: Mask, model: Backbone, criterion: str = "given") -> MaskFacts:
    """Facts of a mask of which nothing is known but the model that it is for.

    Raises InputError where the mask names other tensors or entries than the model's eligible ones.
    """
    if not criterion.isprintable() or not any(bool(tensor.any()) for tensor in mask.values()):
        raise InputError("mask: expected at least one entry that may move, and a criterion in plain words")
    rules: tuple[Eligible, ...] = get_args(Eligible)
    found = {rule: eligible_masks(eligible_shapes(model), rule) for rule in rules}
    exact = (rule for rule in rules if found[rule].keys() == mask.keys())
    wider = (rule for rule in rules if found[rule].keys() >= mask.keys())
    rule = next(chain(exact, wider), rules[0])
    for name, tensor in mask.items():
        allowed = found[rule].get(name)
        if allowed is None or allowed.shape != tensor.shape or bool((tensor.cpu() & ~allowed).any()):
            raise InputError(
                f"mask: {name} {tuple(tensor.shape)} is no eligible tensor of {model.architecture}, or more of it than "
                "is eligible may move; a mask file holds weights and biases of the layers inside the blocks, and where "
                "eligible is paper those of the patch convolution and of the norm behind the blocks"
            )
    return MaskFacts(
        version=__version__,
        criterion=criterion,
        fisher="unknown",
        fisher_samples=0,
        iterations=None,
        granularity="unknown",
        eligible_in=rule,
        eligible=sum(int(tensor.sum()) for tensor in found[rule].values()),
        active=sum(int(tensor.sum()) for tensor in mask.values()),
        target_density=None,
        soft_zero=None,
        calibration="unknown",
        clients=0,
        calibration_images=0,
        seed=None,
        model=model.architecture.as_dict(),
        weights=model.origin.fingerprint,
        data="unknown",
        head="unknown",
    )


def write_mask_file(path: Path, mask: Mask, facts: MaskFacts) -> None:
    """Write a mask file, one bit per entry, sealed."""
    shapes = {name: list(tensor.shape) for name, tensor in mask.items()}
    header = json.dumps({"seal": UNSEALED, "facts": asdict(facts), "shapes": shapes})
    bits = {name: np.packbits(tensor.cpu().numpy().reshape(-1)) for name, tensor in mask.items()}
    write_atomic(path, sealed(save_safetensors(bits, metadata={_HEADER: header})))


def read_mask_file(path: Path) -> tuple[Mask, MaskFacts]:
    """Read a mask file, whatever model it is for.

    Raises InputError where the file is missing, not what was written, or not a mask.

    >>> mask, facts = read_mask_file(Path("masks/mine.safetensors"))
    >>> facts.density
    0.1
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
        return _checked(load_safetensors(content), header["shapes"], _facts(header["facts"]))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"mask {path}: not a readable fedtalos mask file; make it anew with `fedtalos editing`"
        ) from error


def _facts(said: Mapping[str, Any]) -> MaskFacts:
    """The facts that a file says; TypeError where names or types are others."""
    for field in fields(MaskFacts):
        if field.name in said and not _fits(said[field.name], field.type):
            raise TypeError(field.name)
    return MaskFacts(**{**said, "made_from": tuple(said.get("made_from", ()))})


def _fits(value: object, kind: Any) -> bool:
    """Tell whether a value that JSON gave is of the type that MaskFacts has for it."""
    match get_origin(kind):
        case origin if origin is UnionType:
            return any(_fits(value, each) for each in get_args(kind))
        case origin if origin is Literal:
            return value in get_args(kind)
        case origin if origin is tuple:
            return isinstance(value, list) and all(_fits(each, get_args(kind)[0]) for each in value)
        case origin if origin is dict:
            return isinstance(value, dict) and all(_fits(each, get_args(kind)[1]) for each in value.values())
    if isinstance(value, int) and not isinstance(value, bool):
        return kind in (int, float) and abs(value) < 2**63
    return type(value) is kind


def _checked(
    bits: Mapping[str, NDArray[np.uint8]], shapes: Mapping[str, list[int]], facts: MaskFacts
) -> tuple[Mask, MaskFacts]:
    """The mask of these bits; ValueError or TypeError where they are not what shapes and facts say.

    A seal says that nothing changed, not that whoever wrote it meant well.
    """
    mask = {name: _unpacked(bits[name], shape) for name, shape in shapes.items()}
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, facts.eligible_in)
    if eligible.keys() != mask.keys() or not all(map(_NAMES.fullmatch, mask)):
        raise ValueError("other tensors")
    if sum(int(tensor.sum()) for tensor in mask.values()) != facts.active or facts.eligible < max(facts.active, 1):
        raise ValueError("other bits")
    words = [*asdict(facts).values(), *facts.model, *facts.model.values(), *facts.made_from]
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


def origin_differs(headers: Sequence[MaskFacts]) -> str:
    """The points in which masks' models and weights differ, with all values; empty where they are the same."""
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
