"""Aggregation: what the server makes of a round's values, their mean or a rule that attackers cannot pull away.

Shapes: N clients of a round, A entries that move.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedtalos.errors import InputError, TrainingError
from fedtalos.training.entries import Values
from fedtalos.training.masked_parameters import MaskedParameters

Rule = Literal["median", "trimmed_mean", "krum", "multi_krum"]
RobustRule = Callable[[Tensor, int], Tensor]
"""(the clients' values (N, A), all finite; f, attackers among them) -> what is taken for their mean (A,)."""

COLUMNS_AT_ONCE = 2**20  # sorting takes several times the memory of what it sorts


class TooFewError(TrainingError):
    """A rule cannot withstand so many attackers among so few clients."""


class Aggregation(Protocol):
    """Takes a round's clients one by one, then leaves what they come to in the model."""

    needs_finite: bool
    """True: values that are not finite are refused before they are added."""
    writes_alone: bool
    """True: a round that no client's update reached is written too."""

    def add(self, values: list[Tensor], weight: float, /) -> None:
        """Take one client's values, in theta's parts and good for this call only, and how much it counts."""

    def write(self, number: int, /) -> None:
        """Put what round ``number`` comes to into the model, which holds what it began with, and start anew.

        Raises TooFewError, with the model as it was, where nothing can be made of so few clients.
        """


class WeightedMean:
    """sum of n_k theta_k / sum of n_k, as a running mean: memory does not grow with the number of clients."""

    needs_finite = True  # one value that is not would be everybody's
    writes_alone = False

    def __init__(self, moving: MaskedParameters, _clients: float) -> None:
        self._rows = moving.rows
        self._mean, self._total = Values(self._rows), 0.0

    def add(self, values: list[Tensor], weight: float) -> None:
        self._total += weight
        torch._foreach_lerp_(self._mean.parts, values, weight / self._total)

    def write(self, _number: int) -> None:
        torch._foreach_copy_(self._rows, self._mean.parts)
        self._total = 0.0


class Robust:
    """A rule that must see all clients side by side: 4 N A bytes, of the entries that move alone.

    Clients count alike. Who sends a number that is not finite is left out of the round, as one of the attackers.
    """

    needs_finite = False
    writes_alone = False

    def __init__(self, moving: MaskedParameters, clients: float, rule: RobustRule, byzantine: int) -> None:
        """At most ``clients`` take part in a round, f = ``byzantine`` of them attackers."""
        if not isinstance(clients, int):
            raise InputError("sampling poisson: robust rules need a fixed number of clients in a round; take uniform")
        self._moving, self._rule, self._byzantine = moving, rule, byzantine
        self._received, self._finite = torch.empty(clients, len(moving), device=moving.device), list[bool]()

    def add(self, values: list[Tensor], _weight: float) -> None:
        torch._foreach_copy_(self._moving.rows, values)
        vector = self._moving.vector()
        self._received[sum(self._finite)] = vector
        self._finite.append(bool(vector.isfinite().all()))

    def write(self, number: int) -> None:
        """Raises TooFewError where the rule has too few clients left."""
        kept, sent = sum(self._finite), len(self._finite)
        self._finite.clear()
        try:
            result = self._rule(self._received[:kept], max(0, self._byzantine - (sent - kept)))
        except TooFewError as error:
            bad = f"{sent - kept} of {sent} clients sent no finite numbers; " if sent > kept else ""
            raise TooFewError(f"round {number}: {bad}{error}") from error
        self._moving.write(result)


def robust(rule: RobustRule, byzantine: int = 1) -> Callable[[MaskedParameters, float], Robust]:
    """Aggregate by ``rule`` (median, trimmed_mean, krum, multi_krum) against f = ``byzantine`` attackers in a round.

    >>> algorithm = FedAvg(aggregation=robust(krum, byzantine=2))
    """
    return lambda moving, clients: Robust(moving, clients, rule, byzantine)


def check_enough(rule: Rule, clients: int, byzantine: int) -> None:
    """TooFewError where a round's ``clients`` are too few for the rule to withstand f = ``byzantine`` attackers."""
    beyond = {"median": 0, "trimmed_mean": 2 * byzantine, "krum": 2 * byzantine + 2, "multi_krum": 2 * byzantine + 2}
    if clients <= beyond[rule]:
        raise TooFewError(
            f"{rule} against {byzantine} attackers needs over {beyond[rule]} clients in a round, got {clients}"
        )


def median(values: Tensor, _byzantine: int = 0) -> Tensor:
    """Coordinate-wise median (Yin et al., 2018, definition 1); of an even N the mean of the middle two.

    Raises TooFewError where N is 0.

    >>> algorithm = FedAvg(aggregation=robust(median))
    """
    check_enough("median", len(values), 0)
    return trimmed_mean(values, (len(values) - 1) // 2)


def trimmed_mean(values: Tensor, byzantine: int) -> Tensor:
    """Coordinate-wise mean without the f smallest and the f largest (Yin et al., 2018, definition 2; beta = f / N).

    Raises TooFewError unless N > 2 f.

    >>> algorithm = FedAvg(aggregation=robust(trimmed_mean, byzantine=1))
    """
    check_enough("trimmed_mean", len(values), byzantine)
    kept = slice(byzantine, len(values) - byzantine)
    return torch.cat([part.sort(0).values[kept].mean(0) for part in values.split(COLUMNS_AT_ONCE, 1)])


def krum(values: Tensor, byzantine: int, *, chosen: int = 1) -> Tensor:
    """The mean of the ``chosen`` clients of the lowest scores (Blanchard et al., 2017, sections 4 and 5, Multi-Krum).

    A client's score is the sum of squared distances to its N - f - 2 nearest others; of equals the first is taken.
    One chosen is Krum: that client's values, to the bit. Takes N² A steps. Raises TooFewError unless N > 2 f + 2.

    >>> algorithm = FedAvg(aggregation=robust(krum, byzantine=2))
    """
    check_enough("krum", len(values), byzantine)
    # By products (cdist's own choice for many clients) small differences of large values would be lost.
    squares = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
    squares.fill_diagonal_(torch.inf)
    scores = squares.sort(1).values[:, : len(values) - byzantine - 2].sum(1)
    return values[scores.argsort(stable=True)[:chosen].sort().values].mean(0)


def multi_krum(values: Tensor, byzantine: int) -> Tensor:
    """Multi-Krum with m = N - f, as in its authors' experiments.

    >>> algorithm = FedAvg(aggregation=robust(multi_krum, byzantine=2))
    """
    return krum(values, byzantine, chosen=len(values) - byzantine)


RULES: dict[Rule, RobustRule] = {"median": median, "trimmed_mean": trimmed_mean, "krum": krum, "multi_krum": multi_krum}
