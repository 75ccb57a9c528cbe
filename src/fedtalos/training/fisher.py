"""Per-example diagonal Fisher information of the weights of Linear and LayerNorm layers.

    F_i = sum over examples x of ( d log p(y | x) / d theta_i )^2,   y drawn from p(. | x), the model's own prediction

(Iurada, Ciccone and Tommasi, ICLR 2025, section 4.2; Kunstner et al., 2019, on why y is drawn and not the label.)
The square is taken example by example: a batch's gradient is a sum, and its square something else. One backward pass
serves a chunk of examples: hooks form each example's weight gradient from a layer's input and its output's gradient.

Shapes: B examples of a chunk, T tokens, I in and O out features, C classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedtalos.training.local import TrainingError

Scores = dict[str, Tensor]
"""Tensor name -> float32 tensor of the parameter's shape."""


def draw_labels(log_p: Tensor, uniforms: Tensor) -> Tensor:
    """Labels (B,) drawn from the predictive distribution ``log_p`` (B, C), inverting it at ``uniforms`` (B,)."""
    cumulative = log_p.detach().cpu().double().exp().cumsum(1)
    below = (cumulative <= uniforms.double().unsqueeze(1) * cumulative[:, -1:]).sum(1)
    return below.clamp(max=log_p.shape[1] - 1).to(log_p.device)


def fisher_scores(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Iterable[str],
    weights: Mapping[str, Tensor] | None = None,
    *,
    chunk: int = 8,
) -> Scores:
    """Sum of squared per-example gradients of log p(y | x) for the named parameters.

    ``batches`` yields images (B, 3, H, W) and one uniform number in [0, 1) per image (B,), which draws its label.
    ``weights`` replaces parameters by name in the forward pass (the softly masked copy); the model is not changed.
    Memory holds one layer's gradients for ``chunk`` examples, never all layers'.
    Raises TypeError for a parameter that is not of a Linear or LayerNorm, TrainingError where a score is not finite.
    """
    scores = {name: torch.zeros_like(model.get_parameter(name), requires_grad=False) for name in names}
    model.eval()
    with _frozen(model), _squares_added_to(scores, model):
        for images, uniforms in batches:
            for part, u in zip(images.split(chunk), uniforms.split(chunk), strict=True):
                log_p = F.log_softmax(functional_call(model, dict(weights or {}), (part,)).float(), dim=1)
                drawn = draw_labels(log_p, u)
                # Examples do not meet in the forward pass, so the sum's gradients are each example's own.
                log_p.gather(1, drawn.unsqueeze(1)).sum().backward()
    bad = [name for name, score in scores.items() if not bool(score.isfinite().all())]
    if bad:
        raise TrainingError(f"the Fisher score of {bad[0]} is not finite: the weights or images hold NaN or infinity")
    return scores


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside: the hooks form weight gradients, autograd only carries activations."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def _squares_added_to(scores: Scores, model: nn.Module) -> Iterator[None]:
    handles = []
    for path in dict.fromkeys(name.rpartition(".")[0] for name in scores):
        layer = model.get_submodule(path)
        weight, bias = scores.get(f"{path}.weight"), scores.get(f"{path}.bias")
        handles.append(layer.register_forward_pre_hook(_start_graph))
        handles.append(layer.register_forward_hook(_on_output(layer, weight, bias)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _start_graph(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first scored layer starts the graph: with all parameters frozen its input has none."""
    x = inputs[0]
    return inputs if x.requires_grad else (x.detach().requires_grad_(),)


def _on_output(
    layer: nn.Module, weight: Tensor | None, bias: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    if not isinstance(layer, (nn.Linear, nn.LayerNorm)):
        raise TypeError(f"Fisher scores: expected a Linear or LayerNorm layer, got {type(layer).__name__}")

    def forward_hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()

        def add_squares(g: Tensor) -> None:  # (B, T, O)
            g = g.float()
            if bias is not None:
                bias.add_(g.sum(1).square().sum(0))
            if weight is None:
                return
            if isinstance(layer, nn.Linear):
                per_example = torch.einsum("bto,bti->boi", g, x.float())
            else:
                per_example = (g * F.layer_norm(x.float(), layer.normalized_shape, eps=layer.eps)).sum(1)
            weight.add_(per_example.square_().sum(0))

        output.register_hook(add_squares)

    return forward_hook
