"""A finished run whose tasks, or clients, trained apart: its data, its model, and what it kept of each."""

from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MaxLen
from torch import Tensor

from fedtalos.app.config.files import override, read_yaml
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.federation import clients_of
from fedtalos.app.load import Loaded, load
from fedtalos.app.merging import Merger, that_sent
from fedtalos.app.moving import moving_parameters
from fedtalos.app.run.apart import APART, shapes_of_start
from fedtalos.app.run.holders import LocalHolders
from fedtalos.app.run.kept import Kept, Unit, clients_in, groups_of, units_of
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.app.run.progress import Saved
from fedtalos.app.run.resume import from_here, working_folder
from fedtalos.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, tensors_under
from fedtalos.errors import InputError
from fedtalos.facts import Number, Word, facts_from, open_schema
from fedtalos.models.heads import ClosedForm, closed_form
from fedtalos.models.weights.checkpoints import ModelFacts
from fedtalos.training.editing.task_vectors import TaskVector, scaled
from fedtalos.training.entries import named_tensors
from fedtalos.training.federated.clients import Clients
from fedtalos.training.head_fitting import fit_to_sums
from fedtalos.training.masked_parameters import MaskedParameters


@open_schema
@dataclass(frozen=True)
class Merged:
    """Facts of a summary on how the vectors became one."""

    alpha: Number
    refit: Word
    """Kind of the head that was fitted on the merged model, or none."""
    units: Annotated[tuple[Word, ...], MaxLen(2**16)]
    """Names of the tasks or clients."""


@dataclass(frozen=True)
class TrainedApart:
    """The run, its last model in memory, and its units with their vectors, in one order."""

    loaded: Loaded[FederatedConfig]
    checkpoint: Checkpoint
    clients: Clients
    moving: MaskedParameters
    units: list[Unit]
    vectors: list[TaskVector]
    kept: Kept
    alpha: float
    refit: ClosedForm | None
    """Kind of the head that was fitted on the merged model; None where the first head stayed."""

    @property
    def start(self) -> Tensor:
        """Values that every unit started from, (A,)."""
        return self.checkpoint.tensors[f"{APART}start"].to(self.moving.device)

    @property
    def holders(self) -> LocalHolders:
        """The clients, with their images."""
        return LocalHolders(self.loaded, self.clients, self.moving)

    def others(self, out: list[int]) -> tuple[list[Unit], list[TaskVector]]:
        """Units that are not ``out`` and have a say in the merger, and their vectors."""
        rest = [number for number in range(len(self.units)) if number not in out]
        return that_sent([self.units[n] for n in rest], [self.vectors[n] for n in rest])

    def without(self, out: list[int]) -> Tensor:
        """The values (A,) that the run would have been merged to from the other units' vectors."""
        first, tensors = f"{APART}head.", self.checkpoint.tensors
        head = (tensors[f"{first}weight"], tensors[f"{first}bias"])
        merger = Merger(self.loaded, self.holders, self.moving, self.start, head)
        merged = merger.merged(*self.others(out))
        return self.start + scaled(merged.values, self.alpha).to(self.start.device)

    def fit_head_without(self, out: list[int]) -> str:
        """Give the model the head that the other units' sums fix, unless vectors move it; returns how, in words."""
        loaded, rest = self.loaded, [unit for number, unit in enumerate(self.units) if number not in out]
        model, val = loaded.model, loaded.limited("val")
        if self.refit is not None:
            sums = self.holders.head_sums(clients_in(rest), self.refit)
            fit_to_sums(model, reduce(add, (own for _, own in sums)), val, self.refit, loaded.features)
            return "fitted anew to the others' sums over this model's features: exact, but they had to send again"
        if "head.weight" in self.moving.parameters:
            return "moves, so it is as the vectors leave it, from the first head on"
        if (kind := closed_form(loaded.config.model.head)) is None:
            return "as it was: it is not fitted to sums, so nothing can be taken out of it"
        total = reduce(add, (self.kept.read_sums(unit.name, kind, model) for unit in rest))
        now = self.moving.vector()
        self.moving.write(self.start)  # the sums are over the start's features
        fit_to_sums(model, total, val, kind, loaded.features)
        self.moving.write(now)
        return "the others' sums over the start's features, the forgotten ones taken off: exact, nobody sends again"


def read_trained_apart(name: str, root: Path, changes: dict[str, Any]) -> TrainedApart:
    """Read a run with what it kept; ``changes`` are options to read it with, such as the device.

    Raises InputError where there is no such run, or it is not finished, or kept no vectors.
    """
    paths = RunPaths(root, plain_name("run", name))
    if not paths.started:
        raise InputError(f"run {name}: there is none in {root / 'results'}; give the name of a finished run")
    summary = read_yaml(paths.results / "summary.yaml") if paths.finished else {}
    if not paths.finished or not isinstance(summary.get("merged"), dict):
        why = "merged no vectors" if paths.finished else "is not finished"
        raise InputError(f"run {name}: {why}; give a finished run of `federated` with --tasks or --one_shot")
    if not (paths.results / "split.npz").exists():
        raise InputError(
            f"run {name}: has no split.npz, so its clients were those of a fleet; give one of a simulation"
        )
    path = find_checkpoint(Path(name), root / "checkpoints", "last")
    checkpoint = load_checkpoint(path)
    merged = facts_from(Merged, summary["merged"], f"run {name}: its summary is of another version", "make it anew")
    options = checkpoint.stated(Saved, "make it anew").options
    options = from_here(options, "federated", working_folder(paths)) | changes
    loaded = load(override(FederatedConfig(), {**options, "output_dir": str(root)}, str(path)))
    config = loaded.config
    groups = groups_of(config, loaded.data)
    clients = clients_of(loaded.data.train, config.split, config.run.seed, groups)
    moving, kept = moving_parameters(loaded), Kept(paths)
    units = units_of(config, LocalHolders(loaded, clients, moving), groups)
    if [unit.name for unit in units] != list(merged.units):
        raise InputError(f"run {name}: its summary names other tasks or clients than its options; make it anew")
    restore(loaded, checkpoint, name)
    tensors_under(checkpoint.tensors, APART, shapes_of_start(moving))
    vectors = [kept.read(unit.name, moving) for unit in units]
    refit = closed_form(merged.refit)
    return TrainedApart(loaded, checkpoint, clients, moving, units, vectors, kept, merged.alpha, refit)


def restore(loaded: Loaded[FederatedConfig], checkpoint: Checkpoint, name: str) -> None:
    """Load a run's last model into the one that is loaded; InputError where it is another."""
    if checkpoint.stated(ModelFacts, "make it anew").classes != tuple(loaded.data.classes):
        raise InputError(f"run {name}: has other classes; give one of the same data set")
    for tensor_name, tensor in named_tensors(loaded.model).items():
        saved = checkpoint.tensors.get(tensor_name)
        if saved is None or saved.shape != tensor.shape or not saved.is_floating_point():
            raise InputError(f"run {name}: its {tensor_name} is not this model's; give one of the same model")
        tensor.copy_(saved)
