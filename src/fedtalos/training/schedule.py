"""Learning rates over epochs or rounds: constant, cosine or in steps, after a linear warm-up."""

import math
from dataclasses import dataclass
from typing import Literal

from fedtalos.errors import InputError, check_word

ScheduleKind = Literal["constant", "cosine", "step"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the epochs or rounds done, 0 to ``total``.

    Linear warm-up from 0 over ``warmup`` epochs or rounds, then: constant; cosine down to the share ``final`` of the
    peak; or times ``step_gamma`` every ``step_every``.

    Raises InputError for an unknown kind, or a share outside 0 to 1.

    >>> rate = Schedule(1e-3, total=100, kind="cosine")
    >>> rate(0), rate(50)
    (0.001, 0.0005)
    """

    peak: float
    total: int
    kind: ScheduleKind = "cosine"
    warmup: int = 0
    step_every: int = 30
    step_gamma: float = 0.1
    final: float = 0.0

    def __post_init__(self) -> None:
        check_word("kind", self.kind, ScheduleKind)
        if not 0 <= self.final <= 1:
            raise InputError(f"final {self.final}: expected a share of the peak from 0 to 1, such as 0.05")

    def __call__(self, done: float, share: float = 1.0) -> float:
        """The rate after ``done`` epochs or rounds, to be held for a ``share`` of one: a whole round, or a step.

        In the warm-up that is the line's height in the middle of that share, so a single round of warm-up takes half
        the peak, and an epoch's first step next to nothing.
        """
        if done < self.warmup:
            return self.peak * (done + share / 2) / self.warmup
        if self.kind == "cosine":
            last, angle = self.peak * self.final, math.pi * (done - self.warmup) / (self.total - self.warmup)
            return last + (self.peak - last) * 0.5 * (1 + math.cos(angle))
        if self.kind == "step":
            return self.peak * float(self.step_gamma ** (done // self.step_every))
        return self.peak
