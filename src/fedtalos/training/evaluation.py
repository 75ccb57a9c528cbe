"""Loss and accuracy of a model on labelled images."""

from collections.abc import Callable

import numpy as np
import torch

from fedtalos.data.batches import evaluation_batches
from fedtalos.data.images import LabelledImages
from fedtalos.devices import Precision
from fedtalos.metrics import Metrics
from fedtalos.models.backbone import Backbone
from fedtalos.training.engine.capture import Compile
from fedtalos.training.engine.forward import figures_of
from fedtalos.training.feature_cache import plain_source
from fedtalos.training.loop import Batches
from fedtalos.training.masked_parameters import MaskedParameters


def evaluate(
    model: Backbone | MaskedParameters,
    images: LabelledImages,
    *,
    batch_size: int = 250,
    precision: Precision = "fp32",
    compile: Compile = "off",
    watch: Callable[[Batches], Batches] = lambda batches: batches,
) -> Metrics:
    """Measure loss and accuracy on all images, without augmentation.

    With MaskedParameters, what frozen first stages make of the images is computed once and kept. With ``compile`` graph
    or on, batches of one size go through a CUDA graph where that is possible, with the same figures.

    >>> evaluate(model, data.val).accuracy
    0.628
    """
    return sum(
        evaluate_batches(model, images, batch_size=batch_size, precision=precision, compile=compile, watch=watch),
        Metrics(),
    )


@torch.inference_mode()
def evaluate_batches(
    model: Backbone | MaskedParameters,
    images: LabelledImages,
    *,
    batch_size: int = 250,
    precision: Precision = "fp32",
    compile: Compile = "off",
    watch: Callable[[Batches], Batches] = lambda batches: batches,
    first: int = 0,
    every: int = 1,
) -> list[Metrics]:
    """Metrics of batches first, first + every, ..., each by itself, fetched from the device once, at the end."""
    passed = 0
    if isinstance(model, MaskedParameters):
        starts = range(first * batch_size, len(images), every * batch_size)
        with torch.inference_mode(mode=False), torch.no_grad():  # what is kept may be trained on later
            source = model.source(images, [np.arange(s, min(s + batch_size, len(images))) for s in starts])
        passed, model = model.frozen_stages, model.model
    else:
        source = plain_source(model, images)
    model.eval()
    judge = figures_of(model, passed, precision, compile)
    found, examples = [], []
    for x, labels in watch(evaluation_batches(source.images, source.view, batch_size, first=first, every=every)):
        found.append(judge(x, labels))
        examples.append(len(labels))
    figures = torch.stack(found).tolist() if found else []
    return [Metrics(loss, int(correct), count) for (loss, correct), count in zip(figures, examples, strict=True)]
