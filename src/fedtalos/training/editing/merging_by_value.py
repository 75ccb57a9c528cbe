"""Merging rules that look at values alone: mean, TIES, DARE, MagMax, consensus of TALL masks, and LiNeS.

Shapes: V vectors, A entries of a support, E entries of the union within one tensor.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedtalos.errors import InputError, shown
from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS
from fedtalos.notes import note
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.task_vectors import (
    TaskVector,
    changed,
    check_together,
    joined,
    union,
    weighted_sum,
)

Rule = Callable[[str, Tensor, Tensor], Tensor]
"""(tensor name, bool tensor of the E entries in the union, the vectors' values there (V, E) float64) -> (E,)."""


def mean(vectors: Sequence[TaskVector], weights: Sequence[float] | None = None) -> TaskVector:
    """Average vectors, each counting as its weight (None: alike): sum of w_v tau_v over sum of w_v.

    With numbers of images as weights, this is FedAvg's one round. Raises InputError for weights that are no weights.

    >>> merged = mean([tau_of_cats, tau_of_dogs], weights=[900, 100])
    """
    weights = [1.0] * len(vectors) if weights is None else list(weights)
    if len(weights) != len(vectors) or not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise InputError(f"weights {shown(weights)}: expected a number for each of the {len(vectors)} vectors, above 0")
    return weighted_sum(vectors, [weight / sum(weights) for weight in weights], said("mean", vectors))


def ties(vectors: Sequence[TaskVector], share: float = 0.2) -> TaskVector:
    """Trim, elect sign, and average what agrees (TIES-Merging; Yadav et al., 2023, arXiv 2306.01708).

    Each vector keeps the ``share`` of its support of largest magnitude; the paper's 20 % of all entries would trim
    nothing of a vector of density 0.1. An entry's sign is that of the sum of what is left, and its value the mean of
    those that have this sign. Where the sum is exactly 0 it is 0; the authors' code gives it the sign that most entries
    have. Theirs also keeps one entry more, and all that are as large as that one.

    >>> merged = ties([tau_of_cats, tau_of_dogs], share=0.2)
    """

    def elect(_name: str, _where: Tensor, values: Tensor) -> Tensor:
        agrees = values.sign() * values.sum(0).sign() > 0
        return (values * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    return by_entry([trimmed(vector, share) for vector in vectors], elect, said(f"ties {share:g}", vectors))


def trimmed(vector: TaskVector, share: float) -> TaskVector:
    """Keep the ``share`` of a vector's support of largest magnitude, of equals the first; the rest becomes 0.

    >>> merge([trimmed(tau, 0.5) for tau in vectors])
    """
    if not 0 < share <= 1:
        raise InputError(f"share {share}: expected a share of the support, above 0 and at most 1, such as 0.2")
    kept = vector.values.abs().sort(descending=True, stable=True).indices[: max(1, round(share * len(vector)))]
    values = torch.zeros_like(vector.values)
    values[kept] = vector.values[kept]
    return changed(vector, values, f"{vector.facts.command}, trimmed to {share:g}")


def dare(vectors: Sequence[TaskVector], drop: float = 0.9, seed: int = 0) -> TaskVector:
    """Drop entries at random, rescale the rest by 1 / (1 - p), and sum (DARE; Yu et al., 2024, arXiv 2311.03099).

    Each entry of a support is dropped with probability p = ``drop``.

    >>> merged = dare([tau_of_cats, tau_of_dogs], drop=0.9)
    """
    dropped = [randomly_dropped(vector, drop, seed, number) for number, vector in enumerate(vectors)]
    return weighted_sum(dropped, [1.0] * len(dropped), said(f"dare {drop:g}", vectors))


def randomly_dropped(vector: TaskVector, drop: float, seed: int = 0, number: int = 0) -> TaskVector:
    """DARE's one vector: the ``number`` tells the draws of several vectors apart.

    >>> merge([randomly_dropped(tau, 0.9, number=number) for number, tau in enumerate(vectors)], "ties")
    """
    if not 0 <= drop < 1:
        raise InputError(f"drop {drop}: expected a share of the support, at least 0 and below 1, such as 0.9")
    kept = torch.rand(len(vector), generator=torch_generator(seed, "dare", number)) >= drop
    values = (vector.values.double() * kept / (1 - drop)).float()
    return changed(vector, values, f"{vector.facts.command}, dropped {drop:g}")


def magmax(vectors: Sequence[TaskVector]) -> TaskVector:
    """Take the value of largest magnitude, of equals the first (MagMax; Marczak et al., 2024, arXiv 2407.06322).

    The authors' code takes the last of equals.

    >>> merged = magmax([tau_of_cats, tau_of_dogs])
    """

    def largest(_name: str, _where: Tensor, values: Tensor) -> Tensor:
        found = values[0]
        for other in values[1:]:
            found = torch.where(other.abs() > found.abs(), other, found)
        return found

    return by_entry(vectors, largest, said("magmax", vectors))


def consensus(vectors: Sequence[TaskVector], votes: int = 2, selectivity: float = 0.4) -> TaskVector:
    """Keep of the sum what at least ``votes`` vectors need (Consensus Merging; Wang et al., 2024, arXiv 2405.07813).

    A vector needs an entry where |tau_v| >= lambda |tau_sum - tau_v|, its TALL mask; lambda is the ``selectivity``. An
    entry outside its support it does not need. Of vectors of disjoint supports nothing is left with two votes. The
    authors' code chooses lambda for each task by its validation accuracy, among 0.2, 0.3, ... 0.6; here it is one.

    Raises InputError where no entry has the votes.

    >>> merged = consensus([tau_of_cats, tau_of_dogs, tau_of_birds], votes=2)
    """
    if not 1 <= votes <= max(1, len(vectors)) or not selectivity >= 0:
        raise InputError(
            f"votes {votes}, selectivity {selectivity:g}: expected 1 to {len(vectors)} votes, and a selectivity of 0 "
            "or more, such as 2 and 0.4"
        )

    def agreed(_name: str, _where: Tensor, values: Tensor) -> Tensor:
        return values.sum(0) * (tall(values, values.sum(0), selectivity).sum(0) >= votes)

    merged = by_entry(vectors, agreed, said(f"consensus {votes}, {selectivity:g}", vectors))
    if not merged.values.any():
        raise InputError(f"votes {votes}: no entry is needed by so many of {len(vectors)} vectors; take fewer votes")
    return merged


def tall(values: Tensor, merged: Tensor, selectivity: float) -> Tensor:
    """TALL masks, bool (V, E): the entries of a merged vector (E,) that each of the vectors (V, E) needs.

    >>> tall(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([2.0, 2.0]), 0.4)
    tensor([[ True, False],
            [ True,  True]])
    """
    return (values.abs() >= selectivity * (merged - values).abs()) & (values != 0)


def lines(vectors: Sequence[TaskVector], first: float | None = None, last: float = 1.0) -> TaskVector:
    """Scale the sum by depth (LiNeS; Wang et al., 2025, arXiv 2410.17146).

    Block l of L is scaled by alpha + beta (l - 1) / (L - 1): alpha is ``first`` (None: 1/V, so that the first block is
    averaged), and alpha + beta is ``last``. What lies before the blocks counts as the first, what lies behind them as
    the last. Of one vector, this keeps what early layers had learned in general.

    The authors' code departs from this in two points. It scales all that lies outside the blocks by alpha, the last
    norm too. Of several vectors it holds alpha at 1/V and searches beta; here a factor found by ``best_alpha`` scales
    both, so search over ``last`` for theirs. Of a model of another library no blocks are known, which is noted.

    >>> merged = lines([tau_of_cats, tau_of_dogs], last=1.0)
    """
    first = 1 / max(1, len(vectors)) if first is None else first
    merged = weighted_sum(vectors, [1.0] * len(vectors), said(f"lines {first:g} to {last:g}", vectors))
    known = WIDTH_DEPTH_HEADS.get(str(merged.facts.model.get("size")))
    if known is None:
        note("lines", f"no blocks are known of this model: all but the head is scaled by {first:g}")
    places = depths(list(merged.mask), blocks=1 if known is None else known[1])
    parts = merged.parts().items()
    values = [part.double() * (first + (last - first) * places[name]) for name, part in parts]
    return changed(merged, torch.cat(values).float(), merged.facts.command)


def depths(names: Sequence[str], blocks: int) -> dict[str, float]:
    """Depth of each parameter, from 0 (the first block, and all before it) to 1 (the last block, and all behind it).

    >>> depths(["patch_embed.proj.weight", "blocks.0.norm1.bias", "blocks.1.norm1.bias", "head.bias"], blocks=2)
    {'patch_embed.proj.weight': 0.0, 'blocks.0.norm1.bias': 0.0, 'blocks.1.norm1.bias': 1.0, 'head.bias': 1.0}
    """
    number = {name: int(name.split(".")[1]) for name in names if name.startswith("blocks.")}
    behind = {name: float(name.startswith(("norm.", "head."))) for name in names}
    return {name: number[name] / max(1, blocks - 1) if name in number else behind[name] for name in names}


def by_entry(vectors: Sequence[TaskVector], rule: Rule, command: str) -> TaskVector:
    """Put the vectors' values side by side, tensor by tensor, and let a rule make one of them."""
    check_together(vectors)
    parts, mask, found = [vector.parts() for vector in vectors], union(vectors), []
    for name, where in mask.items():
        values = torch.zeros(len(vectors), *where.shape, dtype=torch.float64)
        for row, vector, part in zip(values, vectors, parts, strict=True):
            if name in part:
                row[vector.mask[name]] = part[name].double()
        found.append(rule(name, where, values[:, where]).float())
    return joined(vectors, mask, torch.cat(found), command)


def said(rule: str, vectors: Sequence[TaskVector]) -> str:
    """A rule and how many vectors it made one of, for the facts of the result."""
    return f"{rule} of {len(vectors)} vector{'' if len(vectors) == 1 else 's'}"
