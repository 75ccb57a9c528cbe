"""Predictions: the most probable classes of photos that nobody has labelled.

Shapes: B images of a batch, H W pixels a side, C classes, K = top.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedtalos.data.photos import Photos, open_photos
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.progress import Bar, silent
from fedtalos.training.feature_cache import view_of


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the first one first.

    >>> Prediction("cat.jpg", ("cat", "dog"), (0.9, 0.1)).classes[0]
    'cat'
    """

    image: str
    """Its file, or its number where it came as pixels."""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Probability of each of these classes by softmax, 0 to 1: not calibrated, and surest where it knows least."""


def predict(
    model: Backbone,
    images: str | Path | Iterable[str | Path] | Photos | Tensor,
    classes: Sequence[str],
    *,
    top: int = 5,
    batch_size: int = 64,
    bar: Bar = silent,
) -> list[Prediction]:
    """Name the ``top`` most probable classes of images.

    ``images`` are files, folders or patterns such as "holiday/*.jpg", or pixels, uint8 (N, 3, H, W). Files are decoded
    as those of training were (upright, on white, the middle square), brought to the size of the training images, and
    then resized, cropped and normalised as the model's images are.

    Raises InputError where the classes are not as many as the model's, and for files that are no images.

    >>> model, classes = load_trained("checkpoints/my_run")
    >>> predict(model, ["cat.jpg", "holiday/"], classes, top=1)
    [Prediction(image='cat.jpg', classes=('cat',), probabilities=(0.93,)), ...]
    """
    if len(classes) != model.architecture.num_classes:
        raise InputError(f"classes: expected {model.architecture.num_classes} names, got {len(classes)}")
    if top < 1:
        raise InputError(f"top {top}: expected at least 1")
    if isinstance(images, Tensor):
        names, batches = [str(number) for number in range(len(images))], iter(images.split(batch_size))
    else:
        photos = images if isinstance(images, Photos) else open_photos(images, bar)
        names, batches = [str(file) for file in photos.files], photos.batches(decoded_size(model), batch_size, bar)
    found = (row for rows in _probabilities(model, batches) for row in rows)
    return [_prediction(name, row, classes, top) for name, row in zip(names, found, strict=True)]


def decoded_size(model: Backbone) -> int:
    """Pixels a side of the square that a file is decoded to: that of the training images.

    A model that was trained on the 32 pixels of CIFAR has never seen more detail, whatever size it takes them at.

    >>> decoded_size(model)
    32
    """
    return model.stored_size or view_of(model).resized


@torch.inference_mode()
def _probabilities(model: Backbone, batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Probabilities (B, C) of each batch of uint8 (B, 3, H, W), on the CPU."""
    model.eval()
    view = view_of(model)
    for pixels in batches:
        yield model(view(pixels)).float().softmax(1).cpu()


def _prediction(name: str, probabilities: Tensor, classes: Sequence[str], top: int) -> Prediction:
    values, labels = probabilities.topk(min(top, len(classes)))
    return Prediction(name, tuple(classes[label] for label in labels.tolist()), tuple(values.tolist()))
