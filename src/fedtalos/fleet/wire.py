"""The wire: how a client's values travel, as they are or in fewer bits, with what was lost kept for the next round.

Shapes: A entries that move.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.app.config.fleet import Wire
from fedtalos.errors import InputError
from fedtalos.fleet.letter import Arrays

BLOCK = 1024
"""Values that share a scale in int8."""


def pack(wire: Wire, values: Tensor, theta: Tensor, lost: Tensor | None) -> tuple[Arrays, Tensor | None]:
    """Write a client's values (A,) as arrays; returns them, and what the wire loses of them.

    float32 carries the values themselves, so nothing is lost. Fewer bits carry the update, values - theta, plus what
    was ``lost`` in the client's earlier rounds: error feedback (Seide et al., 2014; Karimireddy et al., 2019).

    >>> arrays, lost = pack("int8", moving.vector(), theta, lost=None)
    """
    if wire == "float32":
        return {"values": values.numpy()}, None
    update = values - theta
    if lost is not None:
        update += lost
    match wire:
        case "float16":
            arrays: Arrays = {"update": update.clamp(-65504, 65504).half().numpy()}
        case "bfloat16":
            arrays = {"update": update.bfloat16().view(torch.uint16).numpy()}
        case "int8":
            arrays = _in_int8(update.numpy())
    return arrays, update - _update(arrays, len(update))


def unpack(arrays: Arrays, theta: Tensor) -> Tensor:
    """Read a client's values (A,) from what ``pack`` wrote; InputError where they are not so many."""
    if "values" in arrays:
        values = arrays["values"]
        if values.dtype != np.float32 or values.shape != tuple(theta.shape):
            raise InputError(f"expected {len(theta)} float32 values, got {values.dtype} of shape {values.shape}")
        return torch.from_numpy(np.array(values))  # a copy: what is received cannot be written to
    return theta + _update(arrays, len(theta))


def _in_int8(update: NDArray[np.float32]) -> Arrays:
    """Each block as whole numbers of -127 to 127 times the block's scale."""
    blocks = np.zeros((-(-len(update) // BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: len(update)] = update
    scales = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    steps = np.rint(blocks / np.where(scales > 0, scales, 1)).astype(np.int8)
    return {"update": steps.reshape(-1)[: len(update)], "scales": scales[:, 0]}


def _update(arrays: Arrays, length: int) -> Tensor:
    update = arrays.get("update")
    if update is None or update.shape != (length,):
        found = "none" if update is None else f"shape {update.shape}"
        raise InputError(f"expected an update of {length} values, got {found}")
    match update.dtype.name:
        case "float16":
            return torch.from_numpy(update.astype(np.float32))
        case "uint16":
            return torch.from_numpy(np.array(update)).view(torch.bfloat16).float()
        case "int8":
            scales = arrays.get("scales")
            if scales is None or scales.dtype != np.float32 or scales.shape != (-(-length // BLOCK),):
                raise InputError(f"expected one float32 scale for every {BLOCK} values of an update in int8")
            return torch.from_numpy(update.astype(np.float32) * np.repeat(scales, BLOCK)[:length])
    raise InputError(f"expected an update in float16, bfloat16 or int8, got {update.dtype}")
