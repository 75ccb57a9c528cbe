"""Files that a run keeps of every unit that trained apart, a task or a client: its vector, and its head's sums.

vectors/RUN.task0.safetensors holds a vector, checkpoints/RUN/task0.sums.safetensors sums over features of the start.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import made_by
from fedtalos.data.class_groups import Groups, class_groups
from fedtalos.data.dataset_loader import Dataset
from fedtalos.data.sampling import Ids
from fedtalos.errors import InputError
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.models.heads import Head, HeadSums
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.editing.vector_facts import facts_of
from fedtalos.training.editing.vector_file import load_vector, save_vector
from fedtalos.training.federated.clients import Clients
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


def units_of(config: FederatedConfig, clients: Clients, groups: Groups) -> list[Unit]:
    """Units that train apart, less those that the options leave out.

    Raises InputError where a number to leave out is none, or nobody would be left.
    """
    out = set(config.apart.leave_out)
    if groups:
        members = clients_of_tasks(len(clients), len(groups))
        every = [Unit(f"task{t}", own, groups[t]) for t, own in enumerate(members)]
    else:
        labels = clients.images.labels.cpu().numpy()
        every = [
            Unit(f"client{k}", range(k, k + 1), tuple(sorted(set(labels[ids].tolist()))))
            for k, ids in enumerate(clients)
        ]
    if strange := sorted(out - set(range(len(every)))):
        what = "tasks" if groups else "clients"
        raise InputError(f"leave_out {strange[0]}: the {what} are 0 to {len(every) - 1}; choose among these")
    left = [unit for number, unit in enumerate(every) if number not in out]
    if not left:
        raise InputError("leave_out: nobody would be left to train; leave out fewer")
    return left


def ids_of(clients: Clients, units: list[Unit]) -> list[Ids]:
    """Images of each client of these units."""
    return [clients[client] for unit in units for client in unit.members]


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
        commit = str(made_by("")["commit"] or "unknown")
        facts = facts_of(moving.model, head, classes=classes, task=task, command=command, commit=commit)
        save_vector(self.vector(prefix + unit.name), TaskVector(moving.entries.masks, values, facts, head))

    def read(self, name: str) -> TaskVector:
        """Read a unit's vector."""
        return load_vector(self.vector(name))

    def write_sums(self, name: str, sums: HeadSums) -> None:
        """Write the sums of a unit's clients, sealed."""
        tensors = {"xy": sums.xy} | ({} if sums.xx is None else {"xx": sums.xx})
        write_atomic(self.sums(name), sealed(save_safetensors(tensors, {"seal": UNSEALED})))

    def read_sums(self, name: str) -> HeadSums:
        """Read the sums of a unit's clients; InputError where they are missing or changed."""
        path = self.sums(name)
        try:
            content = path.read_bytes()
            tensors = load_safetensors(content)
            xy, xx = tensors["xy"], tensors.get("xx")
        except OSError as error:
            raise InputError(f"sums {path}: cannot be read ({error.strerror}); make the run anew") from error
        except (SafetensorError, KeyError) as error:
            raise InputError(f"sums {path}: no sums of a head; make the run anew") from error
        if not is_sealed(content) or xy.dtype != torch.float64:
            raise InputError(f"sums {path}: not what was written (checksum); make the run anew")
        return HeadSums(xy, xx)
