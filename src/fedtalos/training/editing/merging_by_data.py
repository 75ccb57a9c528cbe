"""Merging rules that look at images, through scores and moments that were taken of them: Fisher and RegMean.

Shapes: V vectors, E entries of the union within one tensor, I inputs of a layer.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtalos.data.batches import evaluation_batches
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.merging_by_value import by_entry, said
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.feature_cache import view_of


def fisher_merge(vectors: Sequence[TaskVector], scores: Sequence[Mapping[str, Tensor]]) -> TaskVector:
    """Average vectors, entry by entry, by Fisher scores (Fisher merging; Matena and Raffel, 2022, arXiv 2111.09832).

        tau = sum of F_v tau_v over sum of F_v

    ``scores`` are each vector's own, by parameter name (``fisher_scores`` of its model on its images): of an entry
    outside a vector's support they say how much that task minds a change of it. Where all are 0 it is the mean. Scores
    count as they come: sums over images, so that a task of more images weighs more. The authors' code first divides
    each model's by their 2-norm, and lets no score of the first model be below 1e-6.

    >>> merged = fisher_merge([tau_of_cats, tau_of_dogs], [scores_of_cats, scores_of_dogs])
    """

    def weigh(name: str, where: Tensor, values: Tensor) -> Tensor:
        found = [score.get(name, torch.zeros(where.shape)).cpu() for score in scores]
        if any(score.shape != where.shape or not bool((score >= 0).all()) for score in found):
            raise InputError(f"scores: {name} has another shape than the vectors', or is below 0; give Fisher scores")
        return _weighted(values, torch.stack([score[where].double() for score in found]))

    return by_entry(vectors, weigh, said("fisher", vectors))


def regmean(vectors: Sequence[TaskVector], moments: Sequence[Mapping[str, Tensor]]) -> TaskVector:
    """Average linear weights, column by column, by their inputs' second moments (Jin et al., 2023, arXiv 2212.09849).

        W = (sum of G_v)^-1 sum of G_v W_v,  with the diagonal of G_v = X_v^T X_v alone

    RegMean itself multiplies what lies off the diagonal by a factor of its own; here that is 0, so a layer of I inputs
    costs I numbers and not I^2.

    ``moments`` are each vector's own, by the name of the weight, one for each input (``input_moments``). What has none,
    biases and norms, is averaged plainly, as in the paper.

    >>> merged = regmean([tau_of_cats, tau_of_dogs], [moments_of_cats, moments_of_dogs])
    """

    def weigh(name: str, where: Tensor, values: Tensor) -> Tensor:
        if where.dim() != 2 or not all(name in moment for moment in moments):
            return values.mean(0)
        columns = where.nonzero()[:, 1]
        found = [moment[name].cpu().double() for moment in moments]
        if any(moment.shape != where.shape[1:] or not bool((moment >= 0).all()) for moment in found):
            raise InputError(f"moments: {name} is not one number, 0 or more, for each input; use input_moments")
        return _weighted(values, torch.stack([moment[columns] for moment in found]))

    return by_entry(vectors, weigh, said("regmean", vectors))


def input_moments(model: Backbone, images: LabelledImages, *, batch_size: int = 250) -> dict[str, Tensor]:
    """Sum the squares of every linear layer's inputs over images and tokens: by the weight's name, (I,) float32.

    The diagonal of X^T X that ``regmean`` takes. Sums of several clients add up.

    >>> moments = input_moments(apply(model, tau_of_cats), cats)
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        square = x.detach().float().flatten(0, -2).square().sum(0)
        sums[name] = sums[name] + square if name in sums else square

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=f"{path}.weight": add(name, inputs[0]))
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    model.eval()
    try:
        with torch.inference_mode():
            for x, _ in evaluation_batches(images, view_of(model), batch_size):
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.cpu() for name, total in sums.items()}


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values (V, E) by weights (V, E); the plain one where all weights are 0."""
    total = weights.sum(0)
    return torch.where(total > 0, (values * weights).sum(0) / total.clamp(min=1e-300), values.mean(0))
