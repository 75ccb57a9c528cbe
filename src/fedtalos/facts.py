"""Facts in files, read by a schema: a dataclass says names, types and bounds, and everything else is refused.

One function opens files that may come from strangers, one reads what JSON in them says, one what tables say. All three
raise InputError: one printable line of less than 300 characters that names the file and the field.

Pydantic checks the schemas. It is imported when the first fact is read, so that ``import fedtalos`` stays quick.
"""

import csv
import io
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeVar

from annotated_types import Interval, MaxLen, Predicate

from fedtalos.errors import InputError, printable, shortened, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

MOST_JSON = 2**24
"""Bytes of a file of facts."""
MOST_HEADER = 2**24
"""Bytes of a safetensors header; a ViT's has 20 000."""
MOST_CLASSES = 2**16
"""Classes of a data set or a head; ImageNet-21k has 21 843."""
MOST_CHARACTERS = 255
"""Characters of a class's name, as many as a folder's has."""
MOST_TABLE, MOST_ROWS = 2**26, 200_000
"""Bytes and rows of a table: of a run of 100 000 rounds that are validated each time, or of as many clients."""
MOST_TENSORS = 2**14
"""Tensors in a file; a ViT has 150 to 400."""

_OF_TYPES = re.compile(r"int|str|float|bool|(constrained-|function-|literal\[).*", re.DOTALL)
"""Parts of a place that name one of several types, not a field."""
_LONGEST = 299
"""Characters of a message."""

Count = Annotated[int, Interval(ge=0, le=2**62)]
"""A number of things."""
Number = Annotated[float, Interval(ge=-1e18, le=1e18)]
"""A finite number of any size that a run comes to."""
Share = Annotated[float, Interval(ge=0, le=1)]
Word = Annotated[str, MaxLen(1000), Predicate(str.isprintable)]
"""A few words on one line."""
ClassName = Annotated[str, MaxLen(MOST_CHARACTERS)]
"""A class's name, which may be that of any folder."""
ClassNames = Annotated[tuple[ClassName, ...], MaxLen(MOST_CLASSES)]
Sides = Annotated[tuple[Annotated[int, Interval(ge=1, le=2**31)], ...], MaxLen(8)]
"""Shape of a tensor."""
Shapes = Annotated[dict[Word, Sides], MaxLen(MOST_TENSORS)]
"""Shapes by name of the tensors in a file."""


_NO_CHARACTER = re.compile(rb"(?<!\\)(?<!\\ud[89ab][0-9a-f]{2})\\udc[89a-f][0-9a-f]")
"""A byte of a path that is no character, as Python's JSON escapes it; the readers of facts know none such."""


def schema(kind: type[T]) -> type[T]:
    """Make a dataclass a schema: no fact but its fields is taken, nor another type than theirs; numbers are finite.

    >>> @schema
    ... @dataclass(frozen=True)
    ... class Step:
    ...     done: Count
    ...     loss: Number
    """
    kind.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # type: ignore[attr-defined]
    return kind


def open_schema(kind: type[T]) -> type[T]:
    """Make a dataclass a schema that passes over facts that are none of its fields.

    >>> @open_schema
    ... @dataclass(frozen=True)
    ... class Header:
    ...     format: Count
    """
    kind.__pydantic_config__ = {"extra": "ignore", "strict": True, "allow_inf_nan": False}  # type: ignore[attr-defined]
    return kind


@open_schema
@dataclass(frozen=True)
class Versioned:
    """The fact that every version of a file of ours states."""

    format: Count


def check_version(found: Versioned, known: int, head: str) -> None:
    """Refuse, with an InputError, a file of another format than the one ``known``.

    >>> check_version(read_facts(Versioned, '{"format": 2}', "head"), 2, "checkpoint my_run/last.json")
    """
    if found.format != known:
        raise InputError(f"{head}: format {shown(found.format)}, this version reads {known}; make it anew")


def table_schema(kind: type[T]) -> type[T]:
    """Make a dataclass the schema of a table's rows, whose numbers may be nan or infinite: not known, or diverged.

    >>> @table_schema
    ... @dataclass(frozen=True)
    ... class Row:
    ...     round: Count
    ...     loss: float
    """
    kind.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return kind


def read_file(path: Path, head: str, *, most: int, advice: str = "give another") -> bytes:
    """Read a whole file of at most so many bytes. ``head`` begins the message, such as "checkpoint my_run/last.json".

    Raises InputError where it is larger, cannot be read, or is no plain file: a pipe or a device may have no end.

    >>> content = read_file(Path("split.npz"), "split.npz", most=2**20)
    """
    head = _short(head)
    with plain_file(path, head, advice=advice) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)
        if (size := max(size, len(content))) > most:
            raise InputError(f"{head}: holds {size} bytes, of which {most} are the limit; {advice}")
        return content


@contextmanager
def plain_file(path: Path, head: str, *, advice: str = "give another") -> Iterator[BinaryIO]:
    """Open a file to read, as ``read_file`` does.

    Raises InputError where it cannot be read, inside the block too, or is a folder, a pipe or a device.

    >>> with plain_file(Path("images.safetensors"), "images.safetensors") as file:
    ...     length = int.from_bytes(file.read(8), "little")
    """
    head = _short(head)
    try:
        # Opening a pipe would wait for somebody who writes to it.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISDIR(status.st_mode):
                raise InputError(f"{head}: cannot be read (Is a directory); {advice}")
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{head}: no plain file, but a pipe or a device; {advice}")
            yield file
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{head}: cannot be read ({why}); {advice}") from error


def check_fits(path: Path, head: str, *, times: float = 1) -> int:
    """Refuse, with an InputError, a file whose bytes ``times`` over are more than the memory that is free; its size.

    >>> check_fits(Path("vit.safetensors"), "weights vit.safetensors")
    22883504
    """
    size = path.stat().st_size
    check_free(size * times, f"{head}: of {size / 1e9:.1f} GB", "give another, or make room")
    return size


def check_free(size: float, head: str, advice: str) -> None:
    """Refuse, with an InputError, what takes so many bytes of memory, before it is made, where fewer are free.

    >>> check_free(60_000 * 3 * 224**2, "photos: 60000 images of 224 px", "give a smaller image_size")
    """
    import psutil  # here, for the benchmark on a GPU does without

    free = psutil.virtual_memory().available
    if size > free:
        raise InputError(f"{_short(head)} takes {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free; {advice}")


@contextmanager
def memory_up_to(most: int) -> Iterator[None]:
    """Let this process take so many more bytes in the block, and no more than are free; beyond, a MemoryError comes.

    For libraries that unpack files by themselves. Only Linux counts so; elsewhere nothing is limited.

    >>> with memory_up_to(2**32):
    ...     table = pyarrow.parquet.read_table("train.parquet")
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    import psutil  # here, for the benchmark on a GPU does without

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    taken = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    limit = (int(taken[1]) * 2**10 if taken else 0) + min(most, psutil.virtual_memory().available)
    limits = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def read_facts(kind: type[T], content: bytes | str, head: str, advice: str = "give another") -> T:
    """Read the facts that JSON states into the dataclass ``kind``.

    Raises InputError, "HEAD (FIELD: what was expected, got VALUE); ADVICE", where they are not what its fields say.

    >>> read_facts(Step, '{"done": 3, "loss": 0.5}', "checkpoint my_run/last.json: broken")
    Step(done=3, loss=0.5)
    """
    from pydantic import ValidationError

    if isinstance(content, bytes) and b"\\udc" in content:
        content = _NO_CHARACTER.sub(b"?", content)  # it stays as it is where the facts are used
    try:
        return _adapter(kind).validate_json(content)
    except ValidationError as error:
        raise refusal(head, _fault(error), advice) from error
    except InputError as error:  # a class's own
        raise refusal(head, str(error), advice) from error


def facts_from(kind: type[T], value: object, head: str, advice: str = "give another") -> T:
    """Read facts that were parsed already, such as part of a file, into the dataclass ``kind``; see ``read_facts``.

    >>> facts_from(Step, {"done": 3, "loss": 0.5}, "results/mine/summary.yaml")
    Step(done=3, loss=0.5)
    """
    try:
        content = json.dumps(value, ensure_ascii=False).encode(errors="replace")  # of paths that are no characters
    except (TypeError, ValueError, RecursionError) as error:
        raise refusal(head, str(error), advice) from error
    return read_facts(kind, content, head, advice)


def read_table(
    kind: type[T],
    path: Path,
    *,
    most_bytes: int = MOST_TABLE,
    most_rows: int = MOST_ROWS,
    first: str = "",
    expected: str = "numbers within their limits",
    advice: str = "make the run anew",
) -> tuple[list[str], list[T]]:
    """Read a CSV file: the names of its columns, and its rows, each a dataclass ``kind`` of fields named for columns.

    Columns of fields with a default may be missing, and others may be there. ``first`` is the field that the first
    column is for, whatever its name; ``expected`` says in errors what a row is to hold.

    Raises InputError where a row is torn or not what the fields say, with its line, and where there are too many.

    >>> columns, rows = read_table(MetricsRow, Path("metrics.csv"), first="step")
    """
    content = read_file(path, str(path), most=most_bytes, advice=advice)
    return table_of(kind, content, path, most_rows=most_rows, first=first, expected=expected, advice=advice)


def table_of(
    kind: type[T],
    content: bytes,
    path: Path,
    *,
    most_rows: int = MOST_ROWS,
    first: str = "",
    expected: str = "numbers within their limits",
    advice: str = "make the run anew",
) -> tuple[list[str], list[T]]:
    """Read the content of a CSV file at ``path``; see ``read_table``.

    >>> columns, rows = table_of(MetricsRow, content, Path("metrics.csv"), first="step")
    """
    from pydantic import ValidationError

    adapter, known = _adapter(kind), fields(kind)  # type: ignore[arg-type]
    needed = [field.name for field in known if field.default is MISSING]
    rows: list[T] = []
    try:
        # Decoded as it is read, for text takes several times its bytes; spreadsheets write a mark.
        reader = csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline=""))
        header = next(reader, [])
        columns = {first or header[0]: 0, **{name: place for place, name in enumerate(header)}} if header else {}
        if not set(needed) <= columns.keys() or len(header) > len(known) + 20:
            head = f"{path}: expected the columns {', '.join(needed)}"
            raise refusal(head, f"got {', '.join(header[:20]) or 'an empty file'}", advice)
        taken = [(field.name, columns[field.name]) for field in known if field.name in columns]
        for cells in reader:
            line = f"{path}, line {reader.line_num}: expected {expected}"
            if reader.line_num > most_rows + 1:  # lines count, for empty ones take their time too
                raise refusal(f"{path}: expected {most_rows} rows at most", "there are more", advice)
            if not cells:
                continue
            if len(cells) < len(header):
                raise refusal(line, f"got {shown(cells)}", advice)
            try:
                rows.append(adapter.validate_strings({name: cells[place] for name, place in taken}, strict=False))
            except ValidationError as error:
                raise refusal(line, _fault(error), advice) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise refusal(f"{path}: not a readable CSV file", str(error), advice) from error
    return header, rows


_adapters: dict[type[Any], "TypeAdapter[Any]"] = {}


def _adapter(kind: type[T]) -> "TypeAdapter[T]":
    from pydantic import TypeAdapter

    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def _fault(error: "ValidationError") -> str:
    """One thing that is wrong: its field, what was expected, what came. Of several schemas the nearest counts."""
    found: list[Mapping[str, Any]] = list(error.errors(include_url=False, include_context=False))
    wrong = Counter(each["loc"][:2] for each in found)
    first = min(found, key=lambda each: wrong[each["loc"][:2]])
    message = "expected other text" if first["type"] == "predicate_failed" else str(first["msg"])
    field = ".".join(str(part) for part in first["loc"] if not _OF_TYPES.fullmatch(str(part)))
    came = "" if first["type"] in ("missing", "missing_argument", "json_invalid") else f", got {shown(first['input'])}"
    named = f"{shortened(field, 60)}: " if field else ""
    return f"{named}{message[:1].lower()}{shortened(message[1:], 100)}{came}"


def refusal(head: str, fault: str, advice: str = "give another") -> InputError:
    """Make the error that refuses a file: "HEAD (FAULT); ADVICE", one printable line of less than 300 characters.

    >>> raise refusal("head my.head.safetensors: not a head file", "no head.weight", "make it anew")
    Traceback (most recent call last):
    fedtalos.errors.InputError: head my.head.safetensors: not a head file (no head.weight); make it anew
    """
    head, advice = _short(head), shortened(printable(advice), 70)
    fault = shortened(printable(fault), _LONGEST - len(head) - len(advice) - len(" (); "))
    return InputError(f"{head} ({fault}); {advice}")


def _short(head: str) -> str:
    """Shorten the beginning of a message; of a long path the end stays."""
    return shortened(re.sub(r"\S{71,}", lambda path: f"...{path[0][-67:]}", printable(head)), 150)
