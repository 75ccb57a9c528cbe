"""Checkpoints: tensors as safetensors, everything else as JSON beside them.

`last.json` names its tensor file and that file's sha256. It is renamed into place last, so that a pair is whole or not
there, and it is sealed, so that a flipped bit is noticed in either file. Model tensors keep their names, so that a
checkpoint is a weights file too. Other tensors (an optimiser's state, say) lie beside them under PREFIX/...; no
parameter's name holds a slash.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import MaxLen
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedtalos.errors import InputError, shown
from fedtalos.facts import (
    MOST_JSON,
    Versioned,
    check_fits,
    check_version,
    facts_from,
    open_schema,
    read_facts,
    read_file,
    refusal,
)
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.tensor_file import read_tensors

FORMAT = 2
TENSORS = re.compile(r"(.+)-[0-9]{6,}\.safetensors", re.DOTALL)
"""Names of tensor files: of which checkpoint, after which step."""
APART = re.compile(r"(.+)-0([0-9]{6,})\.safetensors", re.DOTALL)
"""Names of those that lie beside others of the same step."""
HEADER = ("seal", "format", "file", "sha256")
"""Words of a checkpoint about its own file."""


T = TypeVar("T")


@open_schema
@dataclass(frozen=True)
class _Header:
    """Facts about the tensor file."""

    file: Annotated[str, MaxLen(255)]
    sha256: Annotated[str, MaxLen(64)]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the facts that were saved with them.

    >>> checkpoint = load_checkpoint(Path("checkpoints/my_run/last.json"))
    >>> checkpoint.facts["classes"]
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """Facts as the file states them; ``stated`` checks them."""
    sha256: str
    """Checksum of the tensor file."""
    path: Path = Path()
    """The JSON file."""

    def stated(self, kind: type[T], advice: str = "give another") -> T:
        """Read those of the facts that are fields of the dataclass ``kind``, checked by its types and bounds.

        Raises InputError where they are not there, or others: a seal says that nothing changed, not who wrote it.

        >>> load_checkpoint(Path("checkpoints/my_run/last.json")).stated(ModelFacts).classes
        """
        head = f"checkpoint {self.path}: is of another version, or not what it says"
        return facts_from(kind, self.facts, head, advice)


def save_checkpoint(folder: Path, name: str, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write ``folder/name.json`` and its tensor file, then drop the tensor file that it replaces.

    Where there is one of the same step it counts until the JSON names another, whose name has a digit more.

    >>> path = save_checkpoint(Path("checkpoints/my_run"), "last", 3, model.state_dict(), {"classes": data.classes})
    """
    # Mean and std are in the tensor file too, so that it can be used as a weights file by itself. They are one key:
    # safetensors writes several in an order of its own, and files are to be the same to the byte.
    metadata = {"pixels": json.dumps({key: facts[key] for key in ("mean", "std") if key in facts})}
    content = save_safetensors({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, metadata)
    path, file = folder / f"{name}.json", folder / f"{name}-{step:06d}.safetensors"
    if file.is_file() and (file.stat().st_size != len(content) or file.read_bytes() != content):
        _write_pair(path, folder / f"{name}-0{step:06d}.safetensors", content, facts)
    _write_pair(path, file, content, facts)
    remove_replaced(folder, name)
    return path


def _write_pair(path: Path, file: Path, content: bytes, facts: dict[str, Any]) -> None:
    """Write tensors, then the JSON that names them."""
    write_atomic(file, content)
    header = {"seal": UNSEALED, "format": FORMAT, "file": file.name, "sha256": hashlib.sha256(content).hexdigest()}
    write_atomic(path, sealed(json.dumps({**header, **facts}, indent=1).encode()))


def remove_replaced(folder: Path, name: str) -> None:
    """Delete tensor files of ``folder/name.json`` that it does not name: replaced ones, or such as never came to count.

    Tensors whose name got a digit more get their usual one: who saved them was killed before. Where the JSON cannot be
    read, or its own tensors are not there, all stay.

    >>> remove_replaced(Path("checkpoints/my_run"), "last")
    """
    if any(APART.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())):
        with suppress(InputError):
            _name_as_usual(folder / f"{name}.json")
    for path in folder.iterdir() if folder.is_dir() else ():
        tensors = TENSORS.fullmatch(path.name)
        if tensors is not None and tensors[1] == name and _replaced(path, folder / f"{name}.json"):
            path.unlink(missing_ok=True)


def _name_as_usual(path: Path) -> None:
    """Write the pair of a checkpoint anew, where its tensors lie apart from older ones of the same step."""
    facts = load_checkpoint(path).facts
    file = path.with_name(Path(facts["file"]).name)
    apart = APART.fullmatch(file.name)
    if apart is not None and apart[1] == path.stem:
        own = {key: fact for key, fact in facts.items() if key not in HEADER}
        _write_pair(path, path.with_name(f"{apart[1]}-{apart[2]}.safetensors"), file.read_bytes(), own)


def _replaced(tensors: Path, path: Path) -> bool:
    """Tell whether the checkpoint at ``path`` is there, or never was, and names other ``tensors``."""
    try:
        os.lstat(path)
        header = read_file(path, str(path), most=MOST_JSON)
        kept = Path(read_facts(_Header, header, str(path)).file).name if is_sealed(header) else tensors.name
    except FileNotFoundError:
        return True
    except (InputError, OSError):
        return False
    return kept != tensors.name and (path.parent / kept).is_file()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint by its JSON file.

    Raises InputError where a file is missing, broken, not a checkpoint, or not the one that was saved.

    >>> tensors = load_checkpoint(Path("checkpoints/my_run/last.json")).tensors
    """
    head, broken = f"checkpoint {path}", f"checkpoint {path}: broken, or not a fedtalos checkpoint"
    content = read_file(path, head, most=MOST_JSON)
    check_version(read_facts(Versioned, content, broken), FORMAT, head)
    if not is_sealed(content):
        raise refusal(f"{head}: not what was saved", "checksum")
    header = read_facts(_Header, content, broken)
    file = path.parent / Path(header.file).name
    return Checkpoint(_tensors(file, header, head), _parsed(content, broken), header.sha256, path)


def _parsed(content: bytes, head: str) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{head}; give another") from error
    return facts


def _tensors(file: Path, header: _Header, head: str) -> dict[str, Tensor]:
    """Read the tensor file: InputError where it is not the one that was saved, or no memory is left for it."""
    try:
        size = check_fits(file, head, times=2) if file.is_file() else 0  # its bytes, and the tensors made of them
    except OSError:
        size = 0
    content = read_file(file, f"{head}: its {shown(file.name)}", most=size)
    if hashlib.sha256(content).hexdigest() != header.sha256:
        raise refusal(f"{head}: {shown(file.name)} is not what was saved", "checksum")
    return read_tensors(content, f"{head}: broken, or not a fedtalos checkpoint")


def tensors_under(tensors: Mapping[str, Tensor], prefix: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Take a checkpoint's tensors whose names begin with ``prefix``, by the rest of their names.

    Raises InputError where they are not those that ``shapes`` names, of these shapes and of finite numbers.

    >>> tensors_under(checkpoint.tensors, "start/", {"theta": (17_000,), "bias": (10,)})["theta"].shape
    torch.Size([17000])
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name in sorted(found.keys() | shapes.keys()):
        tensor = found.get(name)
        fits = tensor is not None and name in shapes and tensor.shape == tuple(shapes[name])
        if tensor is None or not (fits and tensor.is_floating_point() and bool(tensor.isfinite().all())):
            raise InputError(f"the checkpoint's {shown(prefix + name)} is not of this run; start a run of another name")
    return found


def find_checkpoint(path: Path, checkpoints: Path, which: str = "last") -> Path:
    """Find the JSON file that ``path`` means: itself, or the one of a run, by its name or any of its folders.

    RUN, RUN/last.json, checkpoints/RUN, results/RUN and a tensor file of a checkpoint are all understood. Raises
    InputError where there is none.

    >>> find_checkpoint(Path("my_run"), Path("checkpoints"))
    PosixPath('checkpoints/my_run/last.json')
    """
    if path.suffix == ".json":
        candidates = [path, checkpoints / path]
    elif tensors := re.fullmatch(r"(last|best)-\d+\.safetensors", path.name):
        candidates = [path.with_name(f"{tensors[1]}.json")]
    else:
        candidates = [path / f"{which}.json", checkpoints / path / f"{which}.json"]
        if path.parent.name == "results":
            candidates.append(path.parents[1] / "checkpoints" / path.name / f"{which}.json")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"checkpoint {path}: no {' or '.join(str(c) for c in candidates)}; give a run's name or its .json file"
    )
