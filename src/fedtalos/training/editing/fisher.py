"""Per-example diagonal Fisher information of the weights of Linear, Conv2d and LayerNorm layers.

    F_i = sum over examples x of  E_y [ (d log p(y | x) / d theta_i)^2 ],   y ~ p(. | x), the model's own prediction

Source: Iurada, Ciccone and Tommasi, ICLR 2025, section 4.2. Kunstner et al., 2019, explain why y is drawn from the
model and is not the label. The square is taken example by example: a batch's gradient is a sum, and its square is
something else. One backward pass serves a chunk of examples: hooks form each example's weight gradient from a layer's
input and the gradient of its output.

Shapes: B examples of a chunk, T tokens, I in and O out features, C classes, S labels drawn per example.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from fedtalos.data.batches import evaluation_batches
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.devices import Precision, autocast, strict_float32
from fedtalos.errors import TrainingError, check_word
from fedtalos.models.backbone import Backbone
from fedtalos.randomness import generator
from fedtalos.training.engine.capture import Compile, Steps
from fedtalos.training.entries import all_finite
from fedtalos.training.feature_cache import view_of

Scores = dict[str, Tensor]
"""Tensor name -> float32 tensor of the parameter's shape."""

FisherMode = Literal["true", "exact", "empirical", "batch"]

CHUNKS_THAT_PAY = 8
"""Chunks of one size after which a graph of them pays for its capture, which takes about four."""

CLASSES_ON_CUDA = 4096
"""Classes up to which labels are drawn on the card itself: a triangle of more is too large."""

Scored = tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, H, W), their labels (B,), and uniform numbers in [0, 1) (B, S), which draw labels from the model."""


def scored_batches(
    model: Backbone,
    images: LabelledImages,
    ids: Ids | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
    number: int = 1,
    batch_size: int = 250,
) -> Iterator[Scored]:
    """Batches of the images at ``ids`` (None: of all), with S = ``samples`` uniform numbers for each image.

    An image's numbers depend on the seed, its id and the ``number`` of the iteration, and on nothing else: neither on
    who holds the image, nor on the images beside it.

    >>> scores = fisher_scores(model, scored_batches(model, data.calibration), mask)
    """
    ids = np.arange(len(images)) if ids is None else ids
    draws = np.stack([generator(seed, "labels", number, int(id_)).random(samples) for id_ in ids])
    uniforms = torch.from_numpy(draws).split(batch_size)
    batches = evaluation_batches(images.subset(ids), view_of(model), batch_size)
    for (x, labels), u in zip(batches, uniforms, strict=True):
        yield x, labels, u


def draw_labels(log_p: Tensor, uniforms: Tensor) -> Tensor:
    """Labels (B,) drawn from the predictive distribution ``log_p`` (B, C), inverting it at ``uniforms`` (B,)."""
    classes, device = log_p.shape[1], log_p.device
    on_cuda = device.type == "cuda" and classes <= CLASSES_ON_CUDA
    there = device if on_cuda else torch.device("cpu")  # mps has no float64
    p = log_p.detach().to(there).double().exp()
    # CUDA's cumsum adds in another order each time; a product with a triangle of ones does not.
    cumulative = p @ torch.ones(classes, classes, dtype=p.dtype, device=there).triu() if on_cuda else p.cumsum(1)
    below = (cumulative <= uniforms.to(there).double().unsqueeze(1) * cumulative[:, -1:]).sum(1)
    return below.clamp(max=classes - 1).to(device)


def targets(mode: FisherMode, log_p: Tensor, labels: Tensor, uniforms: Tensor) -> list[tuple[Tensor, Tensor | float]]:
    """Classes (B,) and factors, (B,) or one, of every backward pass.

    The squared gradients of factor x log p(class | x) add up to the mode's score. true: S drawn labels, averaged.
    exact: every class, weighted by its probability. empirical: the labels given, which is no Fisher information. batch:
    drawn labels too, but squares are taken of sums over examples.
    """
    check_word("fisher", mode, FisherMode)
    match mode:
        case "true" | "batch":
            return [(draw_labels(log_p, u), uniforms.shape[1] ** -0.5) for u in uniforms.unbind(1)]
        case "exact":
            root_p = (log_p.detach() / 2).exp()
            return [(torch.full_like(labels, c), root_p[:, c]) for c in range(log_p.shape[1])]
        case "empirical":
            return [(labels, 1.0)]


def fisher_scores(
    model: nn.Module,
    batches: Iterable[Scored],
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    *,
    mode: FisherMode = "true",
    chunk: int = 16,
    precision: Precision = "fp32",
    compile: Compile = "off",
) -> Scores:
    """Sum over examples of squared gradients of log p(y | x), for the parameters that ``masks`` names.

    ``masks``: bool, of the parameters' shapes; rows of a weight before the first and after the last that holds a True
    are not scored and stay 0. ``weights`` replaces parameters by name in the forward pass (the softly masked copy); the
    model is not changed. Forward and backward take ``chunk`` examples at a time, so memory holds their activations and
    one layer's gradients for each of them, never all layers'. Mode batch takes, and squares, whole batches. Every
    scored layer must run once in a forward pass, and nothing after it may work in place. In ``precision`` fp32 labels
    are drawn and gradients formed in strict float32, without TF32 and whatever autocast is on around this: masks must
    not depend on what the processor likes. With ``compile`` graph or on, many chunks of one size become a CUDA graph
    where that is possible.

    Raises TypeError for a parameter of another kind of layer, TrainingError where a score is not finite.

    >>> scores = fisher_scores(model, scored_batches(model, data.calibration), eligible_entries(model).masks)
    >>> scores["blocks.0.mlp.fc1.weight"].shape
    torch.Size([768, 192])
    """
    (scores,) = scores_of_each(
        model, [batches], masks, weights, mode=mode, chunk=chunk, precision=precision, compile=compile
    )
    return scores


def scores_of_each(
    model: nn.Module,
    holders: Iterable[Iterable[Scored]],
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    *,
    mode: FisherMode = "true",
    chunk: int = 16,
    precision: Precision = "fp32",
    compile: Compile = "off",
) -> Iterator[Scores]:
    """Scores of one holder of images after another, by the same steps, which are captured once for all of them.

    ``holders`` are the batches of each; the rest is as in ``fisher_scores``. The scores given are overwritten by those
    of the next holder.

    Raises TypeError and TrainingError as ``fisher_scores`` does.

    >>> total = sum(eligible.gather(scores) for scores in scores_of_each(model, batches_of_clients, eligible.masks))
    """
    scores = {name: torch.zeros_like(model.get_parameter(name), requires_grad=False) for name in masks}
    model.eval()
    device = next(model.parameters()).device
    values = list(scores.values())
    passes = partial(_passes, model, weights or {}, mode, precision)
    add_scores = Steps(passes, lambda: values, compile=compile, after=CHUNKS_THAT_PAY)
    for batches in holders:
        if values:
            torch._foreach_zero_(values)
        strict = strict_float32() if precision == "fp32" else nullcontext()
        squares = _squares_added_to(scores, masks, model, per_example=mode != "batch")
        with strict, autocast(device, "fp32"), _frozen(model), squares:
            for batch in batches:
                size = len(batch[0]) if mode == "batch" else chunk
                drawn = batch[2] if device.type == "mps" else batch[2].to(device)  # mps has no float64
                for images, labels, uniforms in zip(*(t.split(size) for t in (*batch[:2], drawn)), strict=True):
                    add_scores(images, labels, uniforms)
        if values and not all_finite(values):
            _refuse(scores)
        yield scores


def _refuse(scores: Scores) -> None:
    """Raise TrainingError, which names the first tensor of scores that are not finite."""
    bad = [name for name, score in scores.items() if not bool(score.isfinite().all())]
    if bad:
        raise TrainingError(f"the Fisher score of {bad[0]} is not finite: the weights or images hold NaN or infinity")


def _passes(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    mode: FisherMode,
    precision: Precision,
    images: Tensor,
    labels: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """Forward and backward passes of one chunk; its activations are freed on return, before the next chunk's come.

    Returns log p of the classes that were scored last, (B,).
    """
    with autocast(images.device, precision):
        logits = functional_call(model, dict(weights), (images,))
    log_p = F.log_softmax(logits.float(), dim=1)
    passes = targets(mode, log_p, labels, uniforms)
    for number, (classes, factors) in enumerate(passes, start=1):
        # Examples do not meet in the forward pass, so what comes back to each is its own.
        chosen = factors * -F.nll_loss(log_p, classes, reduction="none")  # of gather, CUDA would sort the backward pass
        chosen.sum().backward(retain_graph=number < len(passes))
    return chosen.detach()


def activation_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass over ``images`` (B, 3, H, W), parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)  # kept alive, or a freed activation's address would be counted once for two
    del logits
    return sum(size for pointer, size in kept.items() if pointer not in own)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no parameter's gradient inside: hooks form weight gradients, and autograd carries activations only."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def _squares_added_to(
    scores: Scores, masks: Mapping[str, Tensor], model: nn.Module, *, per_example: bool
) -> Iterator[None]:
    """Add squared weight gradients to ``scores`` in every backward pass inside: of each example, or of their sum."""
    handles = []
    for path in dict.fromkeys(name.rpartition(".")[0] for name in scores):
        layer, weight, bias = model.get_submodule(path), scores.get(f"{path}.weight"), scores.get(f"{path}.bias")
        rows = slice(None) if weight is None else _rows(masks[f"{path}.weight"])
        handles.append(layer.register_forward_hook(_adder(layer, weight, bias, rows, per_example=per_example)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(mask: Tensor) -> slice:
    """Slice from the first to the last row of a weight that holds a True."""
    found = mask.reshape(len(mask), -1).any(1).nonzero()
    return slice(int(found.min()), int(found.max()) + 1) if len(found) else slice(0)


def _adder(
    layer: nn.Module, weight: Tensor | None, bias: Tensor | None, rows: slice, *, per_example: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that has the layer's squared gradients added to ``weight`` and ``bias`` in the backward pass."""
    tokens = _token_view(layer)

    def add_square(score: Tensor, gradients: Tensor) -> None:  # (B, ...)
        gradients = gradients if per_example else gradients.sum(0, keepdim=True)
        score.add_(gradients.square_().sum(0))

    def forward_hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Nothing below the first scored layer asks for a gradient: the graph starts at its output.
        if not output.requires_grad:
            output.requires_grad_()
        x = inputs[0].detach()

        def backward_hook(gradient: Tensor) -> None:
            xs, g = tokens(x.float(), gradient.float())  # (B, T, I), (B, T, O)
            if bias is not None:
                add_square(bias, g.sum(1))
            if weight is None:
                return
            if isinstance(layer, nn.LayerNorm):
                add_square(weight, (g * xs).sum(1))
            elif per_example:
                add_square(weight[rows].flatten(1), torch.bmm(g[..., rows].transpose(1, 2), xs))
            else:
                add_square(weight[rows].flatten(1), (g[..., rows].flatten(0, 1).T @ xs.flatten(0, 1)).unsqueeze(0))

        output.register_hook(backward_hook)

    return forward_hook


def _token_view(layer: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function from a layer's input and output gradient to (B, T, I) and (B, T, O), whose product is a gradient."""
    match layer:
        case nn.Linear():
            return lambda x, g: (_flat(x), _flat(g))
        case nn.LayerNorm(normalized_shape=(_,)):
            return lambda x, g: (_flat(F.layer_norm(x, layer.normalized_shape, eps=layer.eps)), _flat(g))
        case nn.Conv2d(groups=1, padding_mode="zeros", padding=tuple() as padding):
            kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
            return lambda x, g: (
                F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2),
                g.flatten(2).transpose(1, 2),
            )
    raise TypeError(f"Fisher scores: expected a Linear, plain Conv2d or LayerNorm of one dimension, got {layer}")


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, x.shape[-1])  # (B, ..., I) -> (B, T, I)
