"""Metrics are sums and counts that add; they are divided once, where they are read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """Summed cross-entropy (nats), correct answers and examples of some set of images."""

    loss_sum: float = 0.0
    correct: int = 0
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
