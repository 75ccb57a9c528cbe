"""Learning rates over epochs or rounds: constant, cosine or in steps, after a linear warm-up."""

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["constant", "cosine", "step"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the epochs or rounds done, 0 to ``total``.

    Linear warm-up over ``warmup`` epochs or rounds, then: constant; cosine down to zero; or times ``step_gamma`` every
    ``step_every``.

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

    def __call__(self, done: float) -> float:
        """The rate after ``done`` epochs or rounds."""
        if done < self.warmup:
            return self.peak * (done + 1) / (self.warmup + 1)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (self.total - self.warmup)))
        if self.kind == "step":
            return self.peak * float(self.step_gamma ** (done // self.step_every))
        return self.peak
