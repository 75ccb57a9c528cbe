"""Tensors in files: the header of a safetensors file is read by a schema before any tensor is made.

The library checks that tensors lie in the file and not in each other. It does not check that their types and shapes
are such as torch and numpy can make.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval, MaxLen
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.torch import load as load_tensors
from torch import Tensor

from fedtalos.facts import MOST_HEADER, open_schema, plain_file, read_facts, refusal


@open_schema
@dataclass(frozen=True)
class _Stored:
    """A tensor's place; or the file's metadata, of which none of this is asked."""

    dtype: Literal["BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"] = "F32"
    shape: Annotated[tuple[Annotated[int, Interval(ge=0, le=2**40)], ...], MaxLen(8)] = ()


def read_tensors(content: bytes, head: str, advice: str = "give another") -> dict[str, Tensor]:
    """Read the tensors of a safetensors file's content. ``head`` begins the message: which file, and what is wrong.

    Raises InputError where it is none, or one of types and shapes that nothing here writes.

    >>> read_tensors(path.read_bytes(), f"head {path}: not a head file")["head.weight"].shape
    torch.Size([10, 192])
    """
    check_header(content, head, advice)
    try:
        return load_tensors(content)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise refusal(head, str(error), advice) from error


def read_arrays(content: bytes, head: str, advice: str = "give another") -> dict[str, NDArray[Any]]:
    """Read them as numpy arrays; see ``read_tensors``.

    >>> read_arrays(path.read_bytes(), f"vector {path}: not a readable fedtalos vector")["values"]
    """
    check_header(content, head, advice)
    try:
        return load_arrays(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise refusal(head, str(error), advice) from error


def check_header(content: bytes, head: str, advice: str = "give another") -> None:
    """Refuse, with an InputError, a file whose header is not that of tensors; no more of it is looked at.

    >>> check_header(content, "head my.head.safetensors: not a head file")
    """
    read_facts(dict[str, _Stored], _header(content, head, advice), head, advice)


def read_header(path: Path, head: str, advice: str = "give another") -> bytes:
    """Read the header of a safetensors file and no more, for ``check_header`` and ``metadata_of``.

    Raises InputError where it is no plain file, or has none.

    >>> metadata_of(read_header(path, str(path)), "facts", str(path))
    """
    with plain_file(path, head, advice=advice) as file:
        start = file.read(8)
        content = start + file.read(min(MOST_HEADER, int.from_bytes(start, "little")))
    _header(content, head, advice)
    return content


def metadata_of(content: bytes, key: str, head: str, advice: str = "give another") -> str:
    """Take the text under ``key`` from the metadata of a safetensors file; InputError where there is none.

    >>> metadata_of(path.read_bytes(), "fedtalos_mask", f"mask {path}: not a readable fedtalos mask file")
    """
    try:
        parsed: Any = json.loads(_header(content, head, advice))
        text = parsed["__metadata__"][key]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise refusal(head, "it says nothing of itself", advice) from error
    if not isinstance(text, str):
        raise refusal(head, f"its {key} is no text", advice)
    return text


def _header(content: bytes, head: str, advice: str) -> bytes:
    """The JSON at byte 8."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= min(MOST_HEADER, len(content) - 8):
        raise refusal(head, "a header that is longer than the file, or than its limit", advice)
    return content[8 : 8 + length]
