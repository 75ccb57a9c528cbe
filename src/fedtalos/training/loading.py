"""A model for a notebook: weights, a head for the classes, on a device, in one call."""

from pathlib import Path
from typing import get_args

from fedtalos.data.images import LabelledImages
from fedtalos.devices import choose_device
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import read_head, set_head
from fedtalos.models.load import build_model, model_with_weights
from fedtalos.models.vision_transformer import Architecture, ModelSize
from fedtalos.models.weights.read import load_weights
from fedtalos.training.head_fitting import fit_head


def load_model(
    source: str | Path,
    classes: tuple[str, ...],
    *,
    head: LabelledImages | str | Path | None = None,
    image_size: int | None = None,
    patch_size: int = 4,
    pretrained: bool = True,
    device: str = "auto",
    seed: int = 0,
) -> Backbone:
    """Load a Vision Transformer for these classes.

    ``source`` is a size (micro, tiny, small, base, large: ImageNet weights of the hub), a timm ViT's name, "dino",
    "hf:OWNER/REPO[/FILE]", "timm:NAME", "torch:NAME" or a file. ``head`` are images to fit a ridge head on, or a head
    file; without one the head is drawn from ``seed``, and masks refuse to be made through it. ``image_size`` (pixels a
    side) is that of the weights where it is None. With ``pretrained`` False all weights are drawn, for images of
    ``image_size`` (32) pixels in patches of ``patch_size``.

    Raises InputError where the weights cannot be had or do not fit.

    >>> data = load_dataset("cifar100")
    >>> model = load_model("tiny", data.classes, head=data.calibration)
    """
    sizes = get_args(ModelSize)
    if not pretrained:
        if source not in sizes:
            raise InputError(f"source {source}: without pretrained weights expected a size, {', '.join(sizes)}")
        model = build_model(Architecture(str(source), image_size or 32, patch_size, len(classes)), seed)
    else:
        size: ModelSize = next((size for size in sizes if size == source), "small")
        weights = load_weights("pretrained" if source in sizes else str(source), size)
        model = model_with_weights(weights, classes, image_size=image_size, seed=seed)
    model = model.to(choose_device(device))
    if isinstance(head, LabelledImages):
        fit_head(model, head)
    elif head is not None:
        set_head(model, *read_head(Path(head), model))
    return model
