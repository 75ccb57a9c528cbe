"""Sampling: whole shares of a total, and stratified samples.

Letters: N examples.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""Numbers of examples, int64."""


def largest_remainder(shares: NDArray[np.floating], total: int, rng: np.random.Generator) -> Ids:
    """Round ``shares``, which sum to about ``total``, to whole numbers that sum to it exactly.

    Each share is rounded down, and the largest remainders get one more, ties at random.

    >>> largest_remainder(np.array([0.4, 1.7, 2.9]), 5, np.random.default_rng(0))
    array([0, 2, 3])
    """
    whole: Ids = np.floor(shares).astype(np.int64)
    missing = total - whole.sum()
    tie_breaker = rng.random(len(shares))
    if missing > 0:
        lost = whole - shares  # -1 to 0; no sort, there may be a million
        bound = np.partition(lost, missing - 1)[missing - 1]
        ties = np.flatnonzero(lost == bound)
        whole[lost < bound] += 1
        whole[ties[np.argsort(tie_breaker[ties], kind="stable")][: total - whole.sum()]] += 1
    return whole


def stratified_sample(labels: Ids, fraction: float, rng: np.random.Generator) -> Ids:
    """Draw round(fraction N) examples, from each class in proportion to its size; their positions, ascending.

    >>> len(stratified_sample(np.repeat([0, 1], [80, 20]), 0.1, np.random.default_rng(0)))
    10
    """
    sizes = np.bincount(labels)
    taken = largest_remainder(fraction * sizes, round(fraction * len(labels)), rng)
    ids = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(taken)]
    return np.sort(np.concatenate(ids))
