"""Search along a line: the factor alpha that an edit of a model is best with, log-spaced and then refined."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtalos.errors import InputError
from fedtalos.notes import note

GRID = (0.1, 0.18, 0.32, 0.56, 1.0, 1.8)
REFINEMENTS = 2
"""Times that the best alpha's two neighbours move halfway towards it; each takes two evaluations."""


@dataclass(frozen=True)
class BestAlpha:
    """The best alpha, and all that were tried.

    >>> found = best_alpha(model, tau, accuracy)
    >>> found.alpha, found.value, found.tried[0.0]
    (0.42, 0.79, 0.71)
    """

    alpha: float
    value: float
    tried: dict[float, float]
    """alpha -> what was measured, in the order of alpha; 0 is among them."""


def search_alpha(
    measure: Callable[[float], float], *, grid: Sequence[float] = GRID, refinements: int = REFINEMENTS
) -> BestAlpha:
    """Find the alpha that ``measure`` is largest at: among 0 and the ``grid``, then twice closer to the best.

    Eleven evaluations at most. Of equals the smallest is taken, and what measures NaN is taken for the worst. Where the
    best is the largest of the ``grid``, or the smallest tried, that is noted, for a better one may lie beyond.

    Raises InputError for a grid that is not of numbers above 0.

    >>> search_alpha(lambda alpha: -abs(alpha - 0.5)).alpha
    0.4869
    """
    points = sorted(set(grid))
    if not points or not all(math.isfinite(alpha) and alpha > 0 for alpha in points):
        raise InputError(f"grid {tuple(grid)}: expected numbers above 0, such as {GRID}")
    tried = dict[float, float]()

    def best() -> float:
        return max(sorted(tried), key=tried.__getitem__)

    def try_(alpha: float) -> None:
        if alpha not in tried:
            value = measure(alpha)
            tried[alpha] = -math.inf if math.isnan(value) else value

    for alpha in (0.0, *points):
        try_(alpha)
    for _ in range(refinements):
        below = max((alpha for alpha in tried if alpha < best()), default=None)
        above = min((alpha for alpha in tried if alpha > best()), default=None)
        for other in (below, above):
            if other is not None:
                try_(_between(best(), other))
    _note_edge(best(), points, tried)
    return BestAlpha(best(), tried[best()], dict(sorted(tried.items())))


def _between(one: float, other: float) -> float:
    """The middle of two factors by their logarithms; where one is 0, half of the other."""
    middle = math.sqrt(one * other) if one and other else (one + other) / 2
    return float(f"{middle:.4g}")  # short to write down


def _note_edge(best: float, points: Sequence[float], tried: dict[float, float]) -> None:
    """Note that a better alpha may lie outside the grid, or that none helps."""
    if tried[best] == -math.inf:
        note("alpha", "0, for nothing could be measured at any; there may be no image to choose it by")
    elif best == 0:
        worse = all(value < tried[0.0] for alpha, value in tried.items() if alpha)
        note("alpha", f"0, the base itself, is best of {len(tried)}" + ("; every other is worse" if worse else ""))
    elif best == points[-1]:
        note("alpha", f"{best:g} is the largest of the grid, and best; a better one may lie beyond")
    elif not any(0 < alpha < best for alpha in tried):
        note("alpha", f"{best:g} is the smallest tried but 0, and best; a better one may lie between")
