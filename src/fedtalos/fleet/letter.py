"""Letters: everything that server and nodes send each other, as plain facts and plain arrays, never pickled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from fedtalos.errors import InputError

Arrays = dict[str, NDArray[Any]]

TYPES = frozenset({"float64", "float32", "float16", "uint16", "int64", "int32", "int8", "uint8"})
"""Types of numbers that a letter may hold; uint16 carries the bits of bfloat16, uint8 those of masks and files."""
LONGEST = 1 << 20
"""Limit of the facts of a letter, in bytes."""


@dataclass(frozen=True)
class Letter:
    """A kind ("train", "update", ...), facts that JSON can hold, and arrays by name.

    >>> letter = Letter("train", {"round": 3, "client": 0}, {"theta": theta})
    >>> Letter.read(letter.written()).facts["round"]
    3
    """

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.arrays.items():
            if array.dtype.name not in TYPES:
                raise InputError(f"letter {self.kind}: {name} is of {array.dtype}; expected {', '.join(sorted(TYPES))}")

    @property
    def heading(self) -> str:
        """Kind and facts as one line of JSON."""
        return json.dumps({"kind": self.kind, "facts": dict(self.facts)}, separators=(",", ":"))

    @property
    def nbytes(self) -> int:
        """Bytes of the heading and of the arrays; what a network adds to each message is not in it."""
        return len(self.heading.encode()) + sum(array.nbytes for array in self.arrays.values())

    @classmethod
    def of(cls, heading: str, arrays: Arrays) -> "Letter":
        """Put a letter together from its heading and its arrays; InputError where the heading is none."""
        try:
            if len(heading) > LONGEST:
                raise ValueError("too long")
            parts = json.loads(heading)
            kind, facts = parts["kind"], parts["facts"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"letter: its heading cannot be read ({error}); is the other side fedtalos?") from error
        if not isinstance(kind, str) or not isinstance(facts, dict):
            raise InputError("letter: expected a kind and facts; is the other side fedtalos?")
        return cls(kind, facts, arrays)

    def written(self) -> bytes:
        """Write the letter as the content of a safetensors file."""
        contiguous = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        return save_safetensors(contiguous, {"letter": self.heading})

    @classmethod
    def read(cls, content: bytes) -> "Letter":
        """Read what ``written`` gave; InputError for anything else."""
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            heading, arrays = header["__metadata__"]["letter"], load_safetensors(content)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"letter: cannot be read ({error}); is the other side fedtalos?") from error
        return cls.of(str(heading), arrays)


def fact(letter: Letter, name: str, kind: type) -> Any:
    """A fact of a letter, checked to be of a type; InputError where it is missing or is something else."""
    value = letter.facts.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"letter {letter.kind}: expected {name} to be of type {kind.__name__}")
    return value


def vector(letter: Letter, name: str, length: int) -> NDArray[np.float32]:
    """A float32 vector of a letter, checked to be of a length; InputError where it is missing or is something else."""
    array = letter.arrays.get(name)
    if array is None or array.dtype != np.float32 or array.shape != (length,):
        found = "none" if array is None else f"{array.dtype} of shape {array.shape}"
        raise InputError(f"letter {letter.kind}: expected {length} float32 values in {name}, got {found}")
    return array
