"""Merging: one task vector made of several, by the rules of the literature, each on sparse supports.

The support of what comes out is the union of the vectors' supports; a vector is 0 outside its own. Every rule's result
is to be scaled by an alpha (``best_alpha``), as in the papers.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from fedtalos.errors import InputError, check_word
from fedtalos.training.editing.merging_by_data import fisher_merge, regmean
from fedtalos.training.editing.merging_by_svd import iso_c, tsv_merge
from fedtalos.training.editing.merging_by_value import consensus, dare, lines, magmax, mean, said, ties
from fedtalos.training.editing.task_vectors import TaskVector, weighted_sum

Method = Literal["sum", "mean", "ties", "dare", "magmax", "consensus", "lines", "fisher", "regmean", "tsv", "iso_c"]


def merge(
    vectors: Sequence[TaskVector],
    method: Method = "sum",
    *,
    weights: Sequence[float] | None = None,
    share: float = 0.2,
    drop: float = 0.9,
    seed: int = 0,
    selectivity: float = 0.4,
    votes: int = 2,
    first: float | None = None,
    last: float = 1.0,
    scores: Sequence[Mapping[str, Tensor]] | None = None,
    moments: Sequence[Mapping[str, Tensor]] | None = None,
) -> TaskVector:
    """Make one vector of several.

    ``method`` is sum (task arithmetic), mean (``weights``: how much each counts, say images), ties (``share`` of each
    support is kept), dare (share ``drop`` of each support is dropped, by ``seed``), magmax, consensus (entries that
    ``votes`` vectors need; lambda is ``selectivity``), lines (from factor ``first``, 1/V, to ``last`` by depth),
    fisher (``scores`` of each vector's model by parameter name), regmean (``moments`` of each vector's inputs, from
    ``input_moments``), tsv or iso_c. The functions of this module of these names have formulas and sources.

    Raises InputError for vectors of different bases, an unknown method, and arguments outside their limits.

    >>> merged = merge([tau_of_cats, tau_of_dogs], "ties", share=0.2)
    >>> edited = apply(model, merged, alpha=best_alpha(model, merged, accuracy).alpha)
    """
    check_word("method", method, Method)
    match method:
        case "sum":
            return weighted_sum(vectors, [1.0] * len(vectors), said("sum", vectors))
        case "mean":
            return mean(vectors, weights)
        case "ties":
            return ties(vectors, share)
        case "dare":
            return dare(vectors, drop, seed)
        case "magmax":
            return magmax(vectors)
        case "consensus":
            return consensus(vectors, votes, selectivity)
        case "lines":
            return lines(vectors, first, last)
        case "fisher":
            return fisher_merge(vectors, _given("fisher", "scores", scores, vectors))
        case "regmean":
            return regmean(vectors, _given("regmean", "moments", moments, vectors))
        case "tsv":
            return tsv_merge(vectors)
        case "iso_c":
            return iso_c(vectors)


def _given(
    method: str, argument: str, found: Sequence[Mapping[str, Tensor]] | None, vectors: Sequence[TaskVector]
) -> Sequence[Mapping[str, Tensor]]:
    if found is None or len(found) != len(vectors):
        came = "none" if found is None else str(len(found))
        raise InputError(f"{argument}: method {method} needs them for each of the {len(vectors)} vectors, got {came}")
    return found
