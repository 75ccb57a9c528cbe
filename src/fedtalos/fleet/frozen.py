"""The frozen part of a model: its mask and the values that do not move, as one file that a node gets once.

Shapes: A entries that move.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.fleet.letter import Arrays
from fedtalos.training.entries import Mask, named_tensors
from fedtalos.training.masked_parameters import MaskedParameters

MOST_ENTRIES = 2**30
"""Entries of a model that a node takes, all in all: what moves takes no bytes in a letter, and 5 each in memory."""
Shapes = Mapping[str, list[int]]


def frozen_part(moving: MaskedParameters) -> bytes:
    """Write a model's mask, one bit per entry, and the values of its frozen entries, as a safetensors file.

    Tensors that move as a whole are in it by an empty mask alone. It is the same however far training has come.

    >>> content = frozen_part(moving)
    """
    arrays: Arrays = {}
    for name, tensor in named_tensors(moving.model).items():
        mask = moving.entries.masks.get(name)
        if mask is None:
            arrays[f"frozen/{name}"] = tensor.cpu().reshape(-1).numpy()
        elif bool(mask.all()):
            arrays[f"mask/{name}"] = np.empty(0, np.uint8)
        else:
            arrays[f"mask/{name}"] = np.packbits(mask.cpu().reshape(-1).numpy())
            arrays[f"frozen/{name}"] = tensor[~mask].cpu().numpy()
    return save_safetensors(arrays)


def shapes_of(moving: MaskedParameters) -> dict[str, list[int]]:
    """Shapes of all of the model's tensors, by name."""
    return {name: list(tensor.shape) for name, tensor in named_tensors(moving.model).items()}


def read_frozen_part(content: bytes, shapes: Shapes) -> tuple[dict[str, Tensor], Mask]:
    """Read tensors, zero where they move, and the mask; InputError where it is not the frozen part of such a model.

    >>> tensors, mask = read_frozen_part(content, shapes_of(moving))
    """
    try:
        arrays = load_safetensors(content)
        if not {name.partition("/")[2] for name in arrays} == set(shapes):
            raise ValueError("it speaks of other tensors")
        tensors, masks = dict[str, Tensor](), Mask()
        counts = {name: math.prod(shape) for name, shape in shapes.items()}
        if not 0 <= min(counts.values(), default=0) <= sum(counts.values()) <= MOST_ENTRIES:
            raise ValueError(f"its tensors have more than {MOST_ENTRIES} entries, or fewer than none")
        for name, shape in shapes.items():
            count = counts[name]
            bits = arrays.get(f"mask/{name}")
            moves = torch.zeros(count, dtype=torch.bool)
            if bits is not None:
                whole = (
                    np.ones(count, np.bool_) if bits.size == 0 else np.unpackbits(bits, count=count).astype(np.bool_)
                )
                moves = torch.from_numpy(whole)
                masks[name] = moves.view(*shape)
            values = torch.zeros(count)
            if not bool(moves.all()):
                values[~moves] = torch.from_numpy(np.array(arrays[f"frozen/{name}"], np.float32))
            tensors[name] = values.view(*shape)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"the server's model cannot be read ({error}); are both sides of one version?") from error
    return tensors, masks


def sha256(content: bytes) -> str:
    """Checksum by which a file is known."""
    return hashlib.sha256(content).hexdigest()
