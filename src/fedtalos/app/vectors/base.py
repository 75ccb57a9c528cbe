"""The model that vectors are applied to: found by name, given the head that they were made with, and saved again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtalos.app.config.files import flatten
from fedtalos.app.config.schema import RUN_CONFIGS, CentralizedConfig
from fedtalos.app.run.resume import from_here, working_folder
from fedtalos.app.trained import paths_of
from fedtalos.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from fedtalos.data.class_names import check_same_classes
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone, Origin
from fedtalos.models.heads import set_head
from fedtalos.models.load import model_with_weights
from fedtalos.models.weights import Weights
from fedtalos.models.weights.checkpoints import checkpoint_weights, model_facts
from fedtalos.models.weights.read import load_weights
from fedtalos.notes import note
from fedtalos.training.editing.task_vectors import TaskVector, check_fits, check_together
from fedtalos.training.entries import named_tensors
from fedtalos.training.loading import load_trained


@dataclass(frozen=True)
class Base:
    """A model with its classes, and the options that its data are to be loaded with."""

    model: Backbone
    classes: tuple[str, ...]
    command: str
    """Command that the options are of."""
    options: dict[str, Any]
    has_run: bool
    """True where the options are those of a run, whose images are known."""


def base_of(source: str, vectors: Sequence[TaskVector], output_dir: Path) -> Base:
    """Load what the vectors were made on, or a model that was trained or edited from there.

    ``source`` is a run, a checkpoint, or weights as ``--weights`` takes them. The base of vectors is weights and a
    head; the head comes from the vectors. A descendant keeps its own head, and what it learned.

    Raises InputError where there is none, or it is of other weights or classes.
    """
    check_together(vectors)
    path = _checkpoint(source, output_dir)
    if path is None:
        size: Any = vectors[0].facts.model.get("size", "small")
        return _rebuilt(load_weights(source, size), vectors, "centralized", flatten(CentralizedConfig()), has_run=False)
    facts = load_checkpoint(path).facts
    command, options = str(facts.get("command")), facts.get("options")
    has_run = command in RUN_CONFIGS and isinstance(options, dict)
    if has_run:
        options = from_here(dict(options or {}), command, working_folder(paths_of(path)))
    else:
        command, options = "centralized", flatten(CentralizedConfig())
    weights = checkpoint_weights(path)
    descends = facts.get("weights") == vectors[0].facts.weights
    if weights.sha256 == vectors[0].facts.weights or not descends:
        return _rebuilt(weights, vectors, command, options, has_run=has_run)
    model, classes = load_trained(path, device="cpu")
    if vectors[0].facts.classes:
        check_same_classes(vectors[0].facts.classes, classes, f"{source}: the vectors'")
    model.origin = Origin(model.origin.source, vectors[0].facts.weights)
    for vector in vectors:
        check_fits(vector, model)
    note("base", f"{source} began with the weights that the vectors were made on; they are added to what it came to")
    return Base(model, classes, command, options, has_run)


def _checkpoint(source: str, output_dir: Path) -> Path | None:
    """The checkpoint that a name means; None where it is the name of weights."""
    checkpoints = output_dir / "checkpoints"
    if source.endswith(".json") or (checkpoints / source).is_dir() or Path(source).is_dir():
        return find_checkpoint(Path(source), checkpoints)
    return None


def _rebuilt(
    weights: Weights, vectors: Sequence[TaskVector], command: str, options: dict[str, Any], *, has_run: bool
) -> Base:
    """The base itself: weights, with the head that the vectors were made with."""
    facts, head = vectors[0].facts, vectors[0].head
    classes = facts.classes or weights.classes
    if len({vector.facts.head for vector in vectors}) > 1 or head is None:
        raise InputError(
            "vectors: made with several heads, so there is no one base with a head; give a checkpoint that was trained "
            "from these weights, or vectors of one head"
        )
    if classes is None or len(classes) != len(head[1]):
        raise InputError("vectors: do not say which classes their head has; make them anew")
    size = facts.model.get("image_size")
    model = model_with_weights(weights, classes, image_size=size if isinstance(size, int) else None, head="random")
    for vector in vectors:
        check_fits(vector, model)
    set_head(model, *head, source="weights")
    model.mean, model.std, model.interpolation, model.crop = facts.mean, facts.std, facts.interpolation, facts.crop
    return Base(model, classes, command, options, has_run)


def save_edited(base: Base, model: Backbone, folder: Path, edit: dict[str, Any]) -> Path:
    """Write an edited model as a checkpoint that `evaluate` and ``--weights`` take; ``edit`` says what was done."""
    facts = {**model_facts(model, base.classes), "command": base.command, "options": base.options, "edit": edit}
    return save_checkpoint(folder, "last", 0, dict(named_tensors(model)), facts)
