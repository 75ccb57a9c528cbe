"""Files that a run keeps of every unit that trained apart, a task or a client: its vector, and its head's sums.

vectors/RUN.task0.safetensors holds a vector, checkpoints/RUN/task0.sums.safetensors sums over features of the start.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.run.holders import Holders
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import code_commit
from fedtalos.data.class_groups import Groups, class_groups
from fedtalos.data.dataset_loader import Dataset
from fedtalos.errors import InputError
from fedtalos.facts import MOST_HEADER, read_file
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import ClosedForm, Head, HeadSums
from fedtalos.tensor_file import read_tensors
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.editing.vector_facts import facts_of
from fedtalos.training.editing.vector_file import load_vector, save_vector
from fedtalos.training.federated.tasks import clients_of_tasks
from fedtalos.training.masked_parameters import MaskedParameters


@dataclass(frozen=True)
class Unit:
    """Clients whose training gives one vector: those of a task, or one client; and the classes that they hold."""

    name: str
    members: range
    classes: tuple[int, ...]


def groups_of(config: FederatedConfig, data: Dataset) -> Groups:
    """Classes of each task; none where the run has no tasks."""
    options = config.apart
    if options.tasks is None:
        return ()
    try:
        return class_groups(data.classes, options.tasks, options.task_order, config.run.seed)
    except InputError as error:
        what = "task_order" if options.task_order == "superclass" else "tasks"
        raise InputError(f"{what} {getattr(options, what)}: {error}") from error


def units_of(config: FederatedConfig, holders: Holders, groups: Groups) -> list[Unit]:
    """Units that train apart, less those that the options leave out.

    Raises InputError where a number to leave out is none, or nobody would be left.
    """
    out, count = set(config.apart.leave_out), len(holders.clients)
    if groups:
        every = [Unit(f"task{t}", own, groups[t]) for t, own in enumerate(clients_of_tasks(count, len(groups)))]
    else:
        every = [Unit(f"client{k}", range(k, k + 1), holders.classes(k)) for k in range(count)]
    if strange := sorted(out - set(range(len(every)))):
        what = "tasks" if groups else "clients"
        raise InputError(f"leave_out {strange[0]}: the {what} are 0 to {len(every) - 1}; choose among these")
    left = [unit for number, unit in enumerate(every) if number not in out]
    if not left:
        raise InputError("leave_out: nobody would be left to train; leave out fewer")
    return left


def clients_in(units: Sequence[Unit]) -> list[int]:
    """Clients of these units, in their order."""
    return [client for unit in units for client in unit.members]


@dataclass(frozen=True)
class Kept:
    """Files of a run's units.

    >>> Kept(paths).vector("task0")
    PosixPath('vectors/my_run.task0.safetensors')
    """

    paths: RunPaths

    def vector(self, name: str) -> Path:
        """Path of a unit's vector."""
        return self.paths.root / "vectors" / f"{self.paths.name}.{name}.safetensors"

    def sums(self, name: str) -> Path:
        """Path of the sums of a unit's clients, over features of the start."""
        return self.paths.checkpoints / f"{name}.sums.safetensors"

    def check_free(self) -> None:
        """Refuse to begin a run whose vectors are there already."""
        if self.paths.started:  # they are its own
            return
        for path in sorted((self.paths.root / "vectors").glob("*.safetensors")):
            if path.name.rpartition(".")[0].rpartition(".")[0] == self.paths.name:
                raise InputError(f"{path} exists, of an earlier run: move it away, or choose another --run_name")

    def write(
        self,
        unit: Unit,
        values: Tensor,
        moving: MaskedParameters,
        head: Head,
        classes: tuple[str, ...],
        prefix: str = "",
    ) -> None:
        """Write a unit's vector (A,) under its name after ``prefix``; ``head`` is the one that it started with."""
        head = (head[0].detach().cpu(), head[1].detach().cpu())
        task = [classes[number] for number in unit.classes]
        command = f"federated, {prefix}{unit.name} of {self.paths.name}"
        commit = code_commit() or "unknown"
        facts = facts_of(moving.model, head, classes=classes, task=task, command=command, commit=commit)
        save_vector(self.vector(prefix + unit.name), TaskVector(moving.entries.masks, values, facts, head))

    def read(self, name: str, moving: MaskedParameters) -> TaskVector:
        """Read a unit's vector; InputError where it is not of what moves in this run."""
        vector, masks = load_vector(self.vector(name)), moving.entries.masks
        same = vector.mask.keys() == masks.keys() and all(
            torch.equal(vector.mask[key], mask.cpu()) for key, mask in masks.items()
        )
        if not same or vector.head is None or vector.head[0].shape != moving.model.head.weight.shape:
            raise InputError(f"vector {self.vector(name)}: of another mask or model than its run; make the run anew")
        return vector

    def write_sums(self, name: str, sums: HeadSums) -> None:
        """Write the sums of a unit's clients, sealed."""
        tensors = {"xy": sums.xy} | ({} if sums.xx is None else {"xx": sums.xx})
        write_atomic(self.sums(name), sealed(save_safetensors(tensors, {"seal": UNSEALED})))

    def read_sums(self, name: str, kind: ClosedForm, model: Backbone) -> HeadSums:
        """Read the sums of a unit's clients; InputError where they are missing, changed, or of another head."""
        path, advice = self.sums(name), "make the run anew"
        classes, width = model.head.weight.shape
        shapes = {"xy": (width + 1, classes)} | ({"xx": (width + 1, width + 1)} if kind == "ridge" else {})
        most = MOST_HEADER + 8 * sum(map(math.prod, shapes.values()))
        content = read_file(path, f"sums {path}", most=most, advice=advice)
        tensors = read_tensors(content, f"sums {path}: no sums of a head", advice)
        if not is_sealed(content):
            raise InputError(f"sums {path}: not what was written (checksum); {advice}")
        fits = {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
        if not fits or any(t.dtype != torch.float64 or not t.isfinite().all() for t in tensors.values()):
            raise InputError(f"sums {path}: not those of a {kind} head of this model; {advice}")
        return HeadSums(tensors["xy"], tensors.get("xx"))
