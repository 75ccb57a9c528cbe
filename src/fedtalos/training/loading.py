"""A model for a notebook in one call: weights with a head for the classes, or one that a run trained."""

from pathlib import Path
from typing import get_args

from fedtalos.checkpoint import find_checkpoint, load_checkpoint
from fedtalos.data.images import LabelledImages
from fedtalos.devices import choose_device
from fedtalos.errors import InputError, check_word
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import read_head, set_head
from fedtalos.models.load import Resize, build_model, model_with_weights
from fedtalos.models.vision_transformer import Architecture, ModelSize
from fedtalos.models.weights.checkpoints import checkpoint_weights
from fedtalos.models.weights.read import load_weights
from fedtalos.training.head_fitting import fit_head

STORED = {"cifar100": 32, "cifar10": 32, "digits": 8}
"""Pixels a side of the images of data sets that come in one size."""


def load_model(
    source: str | Path,
    classes: tuple[str, ...],
    *,
    head: LabelledImages | str | Path | None = None,
    image_size: int | None = None,
    patch_size: int = 4,
    pretrained: bool = True,
    resize: Resize = "weights",
    device: str = "auto",
    seed: int = 0,
) -> Backbone:
    """Load a Vision Transformer for these classes.

    ``source`` is a size (micro, tiny, small, base, large: ImageNet weights of the hub), a timm ViT's name, "dino",
    "hf:OWNER/REPO[/FILE]", "timm:NAME", "torch:NAME" or a file. ``head`` are images to fit a ridge head on, or a head
    file; without one the head is drawn from ``seed``, and masks refuse to be made through it. ``image_size`` (pixels a
    side) is that of the weights where it is None. Images are resized as the weights' makers did, or with ``resize``
    "plain" bilinearly and whole. With ``pretrained`` False all weights are drawn, for images of
    ``image_size`` (32) pixels in patches of ``patch_size``.

    Raises InputError where the weights cannot be had or do not fit.

    >>> data = load_dataset("cifar100")
    >>> model = load_model("tiny", data.classes, head=data.calibration)
    """
    check_word("resize", resize, Resize)
    sizes = get_args(ModelSize)
    if not pretrained:
        if source not in sizes:
            raise InputError(f"source {source}: without pretrained weights expected a size, {', '.join(sizes)}")
        model = build_model(Architecture(str(source), image_size or 32, patch_size, len(classes)), seed)
    else:
        size: ModelSize = next((size for size in sizes if size == source), "small")
        weights = load_weights("pretrained" if source in sizes else str(source), size)
        model = model_with_weights(weights, classes, image_size=image_size, seed=seed, resize=resize)
    model = model.to(choose_device(device))
    if isinstance(head, LabelledImages):
        fit_head(model, head)
    elif head is not None:
        set_head(model, *read_head(Path(head), model))
    return model


def load_trained(source: str | Path, *, which: str = "last", device: str = "auto") -> tuple[Backbone, tuple[str, ...]]:
    """Load a model that a run trained, with its head, and the names of its classes.

    ``source`` is a run's folder under checkpoints/ (or results/), or one of the files in it; ``which`` of its
    checkpoints, "last" or "best" (on validation), where it is a folder. Nothing but the checkpoint is needed.

    Raises InputError where there is none, or it is broken or holds no model.

    >>> model, classes = load_trained("checkpoints/my_run", which="best")
    >>> predict(model, "cat.jpg", classes)[0].classes[0]
    'cat'
    """
    path = find_checkpoint(Path(source), Path("checkpoints"), which)
    weights = checkpoint_weights(path)
    assert weights.classes is not None
    model = model_with_weights(weights, weights.classes, head="weights")
    options = load_checkpoint(path).facts.get("options")
    model.stored_size = STORED.get(str(options.get("dataset"))) if isinstance(options, dict) else None
    return model.to(choose_device(device)), weights.classes
