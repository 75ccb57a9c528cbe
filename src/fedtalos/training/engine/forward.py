"""Forward passes without gradients as CUDA graphs, kept from one evaluation of a model to the next."""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalos.devices import Precision, autocast
from fedtalos.models.backbone import Backbone
from fedtalos.training.engine.capture import Compile, Steps
from fedtalos.training.micro_batches import correct_answers

Figures = Callable[[Tensor, Tensor], Tensor]
"""Images or features (B, ...), and labels (B,) -> sum of losses and number of correct answers, float32 (2,)."""

_kept: weakref.WeakKeyDictionary[Backbone, dict[object, Figures]] = weakref.WeakKeyDictionary()


def figures_of(model: Backbone, passed: int, precision: Precision, compile: Compile) -> Figures:
    """Make what judges a batch that has passed the first ``passed`` stages of the model.

    With ``compile`` graph or on it is a CUDA graph where that is possible, of the same kernels. Graphs are kept for as
    long as the model's parameters stay where they are in memory.

    >>> figures = figures_of(model, 0, "bf16", "graph")
    >>> loss, correct = figures(images, labels).tolist()
    """
    places = tuple(parameter.data_ptr() for parameter in model.parameters())
    key = (passed, precision, compile, places)
    kept = _kept.setdefault(model, {})
    if key not in kept:
        for other in [other for other in kept if isinstance(other, tuple) and other[-1] != places]:
            del kept[other]
        kept[key] = Steps(_figures(weakref.ref(model), passed, precision), compile=compile)
    return kept[key]


def _figures(model: "weakref.ref[Backbone]", passed: int, precision: Precision) -> Figures:
    """The plain function; a graph that is kept by the model must not keep the model."""

    @torch.inference_mode()
    def figures(x: Tensor, labels: Tensor) -> Tensor:
        alive = model()
        assert alive is not None
        with autocast(x.device, precision):
            logits = alive(x, passed)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        return torch.stack([loss, correct_answers(logits, labels).float()])

    return figures
