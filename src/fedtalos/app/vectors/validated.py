"""Alpha, and how two vectors disturb each other, measured on validation images."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import RUN_CONFIGS
from fedtalos.app.config.vector import ValidationOptions
from fedtalos.app.load import load_images
from fedtalos.app.run.display import say
from fedtalos.app.vectors.base import Base
from fedtalos.data.class_names import check_same_classes
from fedtalos.data.images import LabelledImages
from fedtalos.data.view import View
from fedtalos.devices import choose_device
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.alpha_search import best_alpha
from fedtalos.training.editing.disentanglement import disentanglement_error
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.evaluation import evaluate

Floats = NDArray[np.float64]
ALPHAS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Factors on each of two vectors whose interference is drawn."""


def validated_alpha(base: Base, source: str, vector: TaskVector, options: ValidationOptions, console: Console) -> float:
    """Search alpha by accuracy on the validation images; what was tried is printed, the base is left as it was."""
    images, batch_size = validation_images(base, source, options)

    def accuracy(edited: Backbone) -> float:
        return evaluate(edited, images, batch_size=batch_size).accuracy

    found = best_alpha(base.model.to(images.labels.device), vector, accuracy)
    base.model.to("cpu")
    tried = ", ".join(f"{alpha:g}: {100 * value:.2f}" for alpha, value in found.tried.items())
    say(console, f"validation accuracy (%) of {len(images)} images by alpha: {tried}")
    say(console, f"alpha {found.alpha:g}")
    return found.alpha


def interference(base: Base, source: str, vectors: Sequence[TaskVector], options: ValidationOptions) -> Floats:
    """Weight disentanglement error of two vectors at ALPHAS, on validation images of the classes of each, (G, G)."""
    if len(vectors) != 2:
        raise InputError(f"--base {source}: draws how two vectors disturb each other, got {len(vectors)}; give two")
    images, _ = validation_images(base, source, options)
    own = []
    for vector in vectors:
        seen = [
            number for number, name in enumerate(base.classes) if not vector.facts.task or name in vector.facts.task
        ]
        chosen = torch.isin(images.labels, torch.tensor(seen, device=images.labels.device))
        own.append(images.subset(chosen.nonzero().squeeze(1)))
    return disentanglement_error(base.model.to(images.labels.device), vectors, own, ALPHAS)


def validation_images(base: Base, source: str, options: ValidationOptions) -> tuple[LabelledImages, int]:
    """Validation images, where they are to be computed on, and the size of batches.

    ``source`` is what the user calls the base. Raises InputError where nobody says which images.
    """
    if options.dataset is None and not base.has_run:
        raise InputError(f"--dataset: {source} is weights, which say nothing of images to validate on; give it, too")
    asked = {name: getattr(options, name) for name in ("dataset", "eval_limit")}
    asked["data_dir"] = None if options.data_dir is None else str(options.data_dir)
    given = base.options | {name: value for name, value in asked.items() if value is not None} | {"mask": None}
    run = override(RUN_CONFIGS[base.command](), given, source)
    model = base.model
    view = View(model.architecture.image_size, model.mean, model.std, crop=model.crop)
    data = load_images(run, view.resized)
    check_same_classes(base.classes, data.classes, f"{source}: the vectors'")
    return data.val.slice(0, run.data.eval_limit).to(choose_device(options.device)), run.data.eval_batch_size
