"""Checkpoints of ours, read as weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtalos.checkpoint import load_checkpoint
from fedtalos.errors import InputError
from fedtalos.facts import ClassNames, open_schema
from fedtalos.models.backbone import Backbone
from fedtalos.models.library_model import LibraryArchitecture, bare_model
from fedtalos.models.vision_transformer import Architecture
from fedtalos.models.weights import Weights
from fedtalos.models.weights.pixels import Crop, Interpolation, Middle, Width
from fedtalos.models.weights.read import architecture_of


@open_schema
@dataclass(frozen=True)
class ModelFacts:
    """Facts of a checkpoint about its model.

    >>> load_checkpoint(Path("checkpoints/my_run/last.json")).stated(ModelFacts).classes
    ('cat', 'dog')
    """

    model: Architecture | LibraryArchitecture
    mean: tuple[Middle, Middle, Middle]
    std: tuple[Width, Width, Width]
    classes: ClassNames
    interpolation: Interpolation = "bilinear"
    crop: Crop = 1.0


def model_facts(model: Backbone, classes: Sequence[str]) -> dict[str, Any]:
    """Facts that a checkpoint needs, beside its tensors, for ``checkpoint_weights`` to read it.

    >>> save_checkpoint(folder, "last", 0, dict(named_tensors(model)), model_facts(model, classes))
    """
    return {
        "model": model.architecture.as_dict(),
        "mean": model.mean,
        "std": model.std,
        **resizing_facts(model),
        "weights": model.origin.fingerprint,
        "classes": classes,
    }


def resizing_facts(model: Backbone) -> dict[str, Any]:
    """The way in which a model has its images resized, where it is not the plain one."""
    plain = (model.interpolation, model.crop) == ("bilinear", 1.0)
    return {} if plain else {"interpolation": model.interpolation, "crop": model.crop}


def checkpoint_weights(path: Path) -> Weights:
    """Read a checkpoint of ours as weights, to start from or to use.

    Raises InputError where it is broken, holds no model, or another one than it says.

    >>> checkpoint_weights(Path("checkpoints/my_run/last.json")).classes
    ('cat', 'dog')
    """
    checkpoint = load_checkpoint(path)
    if "model" not in checkpoint.facts:
        raise InputError(f"checkpoint {path}: holds no model, or is of another version; give another")
    facts = checkpoint.stated(ModelFacts)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if "/" not in name}
    _check_is(path, facts, tensors)
    return Weights(
        tensors=tensors,
        architecture=facts.model,
        mean=facts.mean,
        std=facts.std,
        source=str(path),
        sha256=checkpoint.sha256,
        classes=facts.classes,
        interpolation=facts.interpolation,
        crop=facts.crop,
    )


def _check_is(path: Path, facts: ModelFacts, tensors: Mapping[str, Tensor]) -> None:
    """Compare what a checkpoint says of its model with its tensors, before a model of that size is made."""
    if isinstance(facts.model, Architecture):
        same = facts.model == architecture_of(str(path), tensors)
    else:
        with torch.device("meta"):  # shapes alone
            net = bare_model(facts.model.name)
        shapes = {f"net.{name}": parameter.shape for name, parameter in net.named_parameters()}
        same = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("net.")} == shapes
        head = tensors.get("head.weight")
        same = same and head is not None and head.dim() == 2 and len(head) == facts.model.num_classes
    if not same or len(facts.classes) != facts.model.num_classes:
        raise InputError(
            f"checkpoint {path}: its tensors are not those of the {facts.model} that it says; give another"
        )
