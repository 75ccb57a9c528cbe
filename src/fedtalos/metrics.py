"""Metrics: sums and counts that add, and are divided once, when they are read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """Loss and accuracy over a set of images, as sums.

    >>> both = Metrics(loss_sum=8.0, correct=3, examples=4) + Metrics(loss_sum=2.0, correct=3, examples=6)
    >>> both.loss, both.accuracy
    (1.0, 0.6)
    """

    loss_sum: float = 0.0
    """Summed cross-entropy, in nats."""
    correct: int = 0
    """Correct answers."""
    examples: int = 0

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
