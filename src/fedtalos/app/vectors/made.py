"""Task vectors of runs: of two checkpoints, or of a run whose start is rebuilt from its options."""

from pathlib import Path
from typing import Any

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import RUN_CONFIGS, CentralizedConfig, FederatedConfig
from fedtalos.app.config.vector import VectorMakeConfig
from fedtalos.app.federation import clients_of
from fedtalos.app.load import Loaded, load
from fedtalos.app.moving import what_moves
from fedtalos.app.run.apart import APART
from fedtalos.app.run.first_head import everyone
from fedtalos.app.run.recorder import code_commit
from fedtalos.app.run.resume import from_here, working_folder
from fedtalos.app.trained import check_which, paths_of
from fedtalos.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from fedtalos.data.class_names import check_same_classes
from fedtalos.errors import InputError
from fedtalos.models.heads import closed_form, set_head
from fedtalos.notes import note
from fedtalos.training.editing.task_vectors import TaskVector, task_vector
from fedtalos.training.entries import named_tensors
from fedtalos.training.head_fitting import fit_head
from fedtalos.training.loading import load_trained

Trained = Loaded[CentralizedConfig] | Loaded[FederatedConfig]


def made_of(config: VectorMakeConfig) -> TaskVector:
    """The vector that the options ask for."""
    check_which(config.run, config.which)
    path = find_checkpoint(config.run, config.output_dir / "checkpoints", config.which)
    if config.before is None:
        return of_run(path, {"device": config.device} | _place(config.data_dir))
    before = find_checkpoint(config.before, config.output_dir / "checkpoints")
    (old, classes), (new, others) = (load_trained(each, device="cpu") for each in (before, path))
    check_same_classes(classes, others, f"{config.run}: those of {config.before}")
    said = f"{paths_of(path).name} less {paths_of(before).name}"
    return task_vector(old, named_tensors(new), classes=classes, command=said, commit=code_commit() or "unknown")


def _place(data_dir: Path | None) -> dict[str, Any]:
    return {} if data_dir is None else {"data_dir": str(data_dir)}


def of_run(path: Path, changes: dict[str, Any]) -> TaskVector:
    """Subtract a run's own start from its checkpoint; ``changes`` are options to load it with.

    Raises InputError where that start cannot be had again.
    """
    checkpoint, paths = load_checkpoint(path), paths_of(path)
    command, options = str(checkpoint.facts.get("command")), checkpoint.facts.get("options")
    if command not in RUN_CONFIGS or not isinstance(options, dict) or checkpoint.facts.keys() & {"edit", "forgot"}:
        raise InputError(
            f"checkpoint {path}: not of a training run, so its start is not known; give --before, what to subtract"
        )
    found = {**from_here(options, command, working_folder(paths)), **changes}
    loaded: Any = load(override(RUN_CONFIGS[command](), found, str(path)))
    mask = what_moves(loaded)
    if loaded.model.origin.fingerprint != checkpoint.facts.get("weights"):
        raise InputError(f"checkpoint {path}: the weights that its run began with have changed; put them back")
    check_same_classes(tuple(map(str, checkpoint.facts.get("classes", ()))), loaded.data.classes, str(path))
    rebuild_head(loaded, checkpoint, path, moves="head.weight" in mask)
    return task_vector(
        loaded.model,
        checkpoint.tensors,
        mask,
        classes=loaded.data.classes,
        command=f"{command} {paths.name}",
        commit=code_commit() or "unknown",
    )


def rebuild_head(loaded: Trained, checkpoint: Checkpoint, path: Path, *, moves: bool) -> None:
    """Give the model the head that its run began with: one that was kept, or did not move, else it is fitted anew."""
    kind = loaded.config.model.head
    if isinstance(loaded.config, FederatedConfig) and loaded.config.apart.asked:
        last = load_checkpoint(path.with_name("last.json")).tensors  # the model's head may be fitted anew
        if (names := {f"{APART}head.weight", f"{APART}head.bias"}) - last.keys():
            raise InputError(f"checkpoint {path}: there is none of {', '.join(sorted(names))} beside it; give --before")
        set_head(loaded.model, last[f"{APART}head.weight"], last[f"{APART}head.bias"], source=kind)
    elif not moves:
        set_head(loaded.model, checkpoint.tensors["head.weight"], checkpoint.tensors["head.bias"], source=kind)
    elif (form := closed_form(kind)) is not None:
        fit_head(
            loaded.model,
            loaded.data.train,
            form,
            holders=_holders(loaded),
            val=loaded.limited("val"),
            features=loaded.features,
        )
        note("start", f"the {kind} head was fitted anew, as the run had done")
    elif kind == "linear":
        raise InputError(
            f"checkpoint {path}: its run trained its first head before it began, which is not kept; give --before, or "
            "make the run anew with --save_vector"
        )


def _holders(loaded: Trained) -> Any:
    if isinstance(loaded.config, CentralizedConfig):
        return everyone(len(loaded.data.train))
    config = loaded.config
    return clients_of(loaded.data.train, config.split, config.run.seed)
