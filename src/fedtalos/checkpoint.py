"""Checkpoints: tensors as safetensors, everything else as JSON beside them.

`last.json` names its tensor file and that file's sha256. It is renamed into place last, so that a pair is whole or not
there, and it is sealed, so that a flipped bit is noticed in either file. Model tensors keep their names, so that a
checkpoint is a weights file too. Optimiser state lies beside them under `optimizer/...`; no parameter's name holds a
slash.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedtalos.errors import InputError, shown
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the facts that were saved with them.

    >>> checkpoint = load_checkpoint(Path("checkpoints/my_run/last.json"))
    >>> checkpoint.facts["classes"]
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    sha256: str
    """Checksum of the tensor file."""


def save_checkpoint(folder: Path, name: str, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write ``folder/name.json`` and its tensor file, then drop the tensor file that it replaces.

    >>> path = save_checkpoint(Path("checkpoints/my_run"), "last", 3, model.state_dict(), {"classes": data.classes})
    """
    # Mean and std are in the tensor file too, so that it can be used as a weights file by itself. They are one key:
    # safetensors writes several in an order of its own, and files are to be the same to the byte.
    metadata = {"pixels": json.dumps({key: facts[key] for key in ("mean", "std") if key in facts})}
    content = save_safetensors({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, metadata)
    file = folder / f"{name}-{step:06d}.safetensors"
    write_atomic(file, content)
    header = {"seal": UNSEALED, "format": FORMAT, "file": file.name, "sha256": hashlib.sha256(content).hexdigest()}
    path = folder / f"{name}.json"
    write_atomic(path, sealed(json.dumps({**header, **facts}, indent=1).encode()))
    for old in folder.glob(f"{name}-*.safetensors"):
        if old != file:
            old.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint by its JSON file.

    Raises InputError where a file is missing, broken, not a checkpoint, or not the one that was saved.

    >>> tensors = load_checkpoint(Path("checkpoints/my_run/last.json")).tensors
    """
    try:
        header = path.read_bytes()
        facts = json.loads(header)
        if facts["format"] != FORMAT:
            raise InputError(
                f"checkpoint {path}: format {shown(facts['format'])}, this version reads {FORMAT}; make it anew"
            )
        if not is_sealed(header):
            raise InputError(f"checkpoint {path}: not what was saved (checksum); give another")
        content = (path.parent / Path(facts["file"]).name).read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise InputError(f"checkpoint {path}: {facts['file']} is not what was saved (checksum); give another")
        tensors: dict[str, Tensor] = load_safetensors(content)
    except OSError as error:
        raise InputError(f"checkpoint {path}: cannot read {error.filename} ({error.strerror}); give another") from error
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(f"checkpoint {path}: broken, or not a fedtalos checkpoint; give another") from error
    return Checkpoint(tensors, facts, facts["sha256"])


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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Take an optimiser's state as tensors by name.

    >>> tensors = {**model.state_dict(), **optimizer_tensors(optimizer)}
    """
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer/{index}/{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the state back that ``optimizer_tensors`` took; other tensors are ignored.

    >>> restore_optimizer(optimizer, load_checkpoint(path).tensors)
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
