"""Metrics: sums and counts that add, and are divided once, when they are read."""

import math
from dataclasses import dataclass

from fedtalos.facts import Count, Number, schema


@schema
@dataclass(frozen=True)
class Metrics:
    """Loss and accuracy over a set of images, as sums.

    >>> both = Metrics(loss_sum=8.0, correct=3, examples=4) + Metrics(loss_sum=2.0, correct=3, examples=6)
    >>> both.loss, both.accuracy
    (1.0, 0.6)
    """

    loss_sum: Number = 0.0
    """Summed cross-entropy, in nats."""
    correct: Count = 0
    """Correct answers."""
    examples: Count = 0

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(self.loss_sum + other.loss_sum, self.correct + other.correct, self.examples + other.examples)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats (nan where there are no examples)."""
        return self.loss_sum / self.examples if self.examples else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0 to 1 (nan where there are no examples)."""
        return self.correct / self.examples if self.examples else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, 0 to 1 (nan where there are no examples)."""
        return wilson(self.accuracy, self.examples)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share that was measured on ``count`` examples, 0 to 1; nan where it is not known.

    It says how far other images of the same kind would take the figure, not other seeds. Source: Wilson, 1927, Probable
    inference, the law of succession, and statistical inference.

    >>> low, high = wilson(0.9, 100)
    >>> f"{low:.3f} to {high:.3f}"
    '0.826 to 0.945'
    """
    if count <= 0 or math.isnan(share):
        return math.nan, math.nan
    z = 1.959964  # 97.5 % quantile of the normal distribution
    middle, spread = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (middle - spread) / (1 + z**2 / count), (middle + spread) / (1 + z**2 / count)
