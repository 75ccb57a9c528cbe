"""Forward passes without gradients as CUDA graphs, kept from one evaluation of a model to the next."""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalos.devices import Precision, autocast
from fedtalos.models.backbone import Backbone
from fedtalos.training.engine.capture import Compile, StepFunction, Steps
from fedtalos.training.micro_batches import correct_answers

_kept: weakref.WeakKeyDictionary[Backbone, dict[object, Steps]] = weakref.WeakKeyDictionary()


def figures_of(model: Backbone, passed: int, precision: Precision, compile: Compile) -> Steps:
    """Make what judges a batch that has passed the first ``passed`` stages of the model.

    It maps images or features (B, ...), and labels (B,), to the sum of losses and the number of correct answers,
    float32 (2,). With ``compile`` graph or on it is a CUDA graph where that is possible, of the same kernels. Graphs
    are kept for as long as the model's parameters stay where they are in memory.

    >>> figures = figures_of(model, 0, "bf16", "graph")
    >>> loss, correct = figures(images, labels).tolist()
    """
    return _steps(model, _figures, passed, precision, compile)


def features_of(model: Backbone, passed: int, precision: Precision, compile: Compile) -> Steps:
    """Make what takes images (B, 3, H, W) through the first ``passed`` stages of the model, to float32 (B, ...).

    ``compile`` is that of ``figures_of``.

    >>> features = features_of(model, len(model.stages), "bf16", "graph")(images)
    """
    return _steps(model, _features, passed, precision, compile)


Forward = Callable[["weakref.ref[Backbone]", int, Precision], StepFunction]


def _steps(model: Backbone, forward: Forward, passed: int, precision: Precision, compile: Compile) -> Steps:
    """Find the steps of a forward function among those kept of the model, or make them."""
    places = tuple(parameter.data_ptr() for parameter in model.parameters())
    key = (forward, passed, precision, compile, places)
    kept = _kept.setdefault(model, {})
    if key not in kept:
        for other in [other for other in kept if isinstance(other, tuple) and other[-1] != places]:
            del kept[other]
        kept[key] = Steps(forward(weakref.ref(model), passed, precision), compile=compile)
    return kept[key]


def _figures(model: "weakref.ref[Backbone]", passed: int, precision: Precision) -> StepFunction:
    """The plain function; a graph that is kept by the model must not keep the model."""

    @torch.inference_mode()
    def figures(x: Tensor, labels: Tensor) -> Tensor:
        with autocast(x.device, precision):
            logits = _alive(model)(x, passed)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        return torch.stack([loss, correct_answers(logits, labels).float()])

    return figures


def _features(model: "weakref.ref[Backbone]", passed: int, precision: Precision) -> StepFunction:
    @torch.no_grad()  # and no more: what is kept may be trained on
    def features(images: Tensor) -> Tensor:
        with autocast(images.device, precision):
            return _alive(model).run(images, 0, passed).float()

    return features


def _alive(model: "weakref.ref[Backbone]") -> Backbone:
    alive = model()
    assert alive is not None
    return alive
