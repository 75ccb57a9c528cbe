"""Task vectors on disk: safetensors, a bit per entry of what moves and a float32 for each that does, and facts."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from fedtalos.errors import InputError
from fedtalos.facts import Count, Shapes, Versioned, Word, check_version, read_facts, read_file, refusal, schema
from fedtalos.facts import check_fits as check_memory
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import Head
from fedtalos.tensor_file import metadata_of, read_arrays
from fedtalos.training.editing.mask_facts import fingerprint as mask_fingerprint
from fedtalos.training.editing.mask_file import MOST_ENTRIES, packed, unpacked
from fedtalos.training.editing.task_vectors import TaskVector, check_fits
from fedtalos.training.editing.vector_facts import VectorFacts, head_fingerprint

FORMAT = 1

_HEADER = "fedtalos_vector"
_MASK, _VALUES, _HEAD = "mask/", "values", ("head/weight", "head/bias")
"""Names in the file; no parameter's name holds a slash."""


@schema
@dataclass(frozen=True)
class _Header:
    """Facts that the file states of itself."""

    seal: Word
    format: Count
    mask: Word
    """Fingerprint of the support."""
    active: Count
    """Entries of the support."""
    shapes: Shapes
    facts: VectorFacts


def save_vector(path: Path | str, vector: TaskVector) -> None:
    """Write a vector to a sealed file, whole or not at all: a bit per entry of each tensor that moves, and the values.

    The header says of which weights, head and classes the vector is, and how it was made.

    >>> save_vector("vectors/cats.safetensors", tau)
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in vector.mask.items()}
    header = _Header(UNSEALED, FORMAT, mask_fingerprint(vector.mask), len(vector), shapes, vector.facts)
    arrays: dict[str, NDArray[Any]] = {f"{_MASK}{name}": bits for name, bits in packed(vector.mask).items()}
    arrays[_VALUES] = vector.values.numpy()
    if vector.head is not None:
        arrays |= {name: tensor.float().numpy() for name, tensor in zip(_HEAD, vector.head, strict=True)}
    write_atomic(Path(path), sealed(save_safetensors(arrays, metadata={_HEADER: json.dumps(asdict(header))})))


def load_vector(path: Path | str, model: Backbone | None = None) -> TaskVector:
    """Read a vector; with a model, one that is to be applied to it.

    Raises InputError where the file is missing, not what was written or no vector, and where the vector was made on
    other weights than the model's.

    >>> tau = load_vector("vectors/cats.safetensors", model)
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"vector {path}: no such file; runs with save_vector write one under vectors/")
    broken, advice = f"vector {path}: not a readable fedtalos vector", "make it anew"
    content = read_file(path, f"vector {path}", most=check_memory(path, f"vector {path}", times=4))
    text = metadata_of(content, _HEADER, broken, advice)
    check_version(read_facts(Versioned, text, broken, advice), FORMAT, f"vector {path}")
    if not is_sealed(content):
        raise InputError(f"vector {path}: not what was written (checksum); make it anew")
    header = read_facts(_Header, text, broken, advice)
    try:
        vector = _checked(read_arrays(content, broken, advice), header)
    except (KeyError, TypeError, ValueError) as error:
        raise refusal(broken, str(error) if type(error) is ValueError else "tensors are missing", advice) from error
    if model is not None:
        check_fits(vector, model)
    return vector


def _checked(arrays: Mapping[str, NDArray[Any]], header: _Header) -> TaskVector:
    """The vector of these arrays; ValueError or TypeError where they are not what the header says.

    A seal says that nothing changed, not that whoever wrote it meant well.
    """
    if sum(map(math.prod, header.shapes.values())) > MOST_ENTRIES:
        raise ValueError("more entries than any model here has")
    mask = {name: unpacked(arrays[f"{_MASK}{name}"], list(shape)) for name, shape in header.shapes.items()}
    for array in (arrays[_VALUES], *(arrays[name] for name in _HEAD if name in arrays)):
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError("numbers that no vector has")
    if mask_fingerprint(mask) != header.mask or not all(bool(tensor.any()) for tensor in mask.values()):
        raise ValueError("other bits")
    if arrays[_VALUES].shape != (header.active,) or not 0 < header.active <= header.facts.parameters:
        raise ValueError("another number of values")
    # Copies: arrays from a file may be read-only, or lie where floats must not.
    return TaskVector(mask, torch.from_numpy(arrays[_VALUES].copy()), header.facts, _head(arrays, header.facts))


def _head(arrays: Mapping[str, NDArray[Any]], facts: VectorFacts) -> Head | None:
    """The base's head, if the file has it; ValueError where it is not the one that the facts name."""
    if not any(name in arrays for name in _HEAD):
        return None
    weight, bias = (torch.from_numpy(arrays[name].copy()) for name in _HEAD)
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or head_fingerprint((weight, bias)) != facts.head:
        raise ValueError("another head")
    return weight, bias
