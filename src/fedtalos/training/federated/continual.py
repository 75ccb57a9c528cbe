"""Continual learning: accuracies of each task after each task, and what they come to.

Letters: T tasks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Course:
    """Accuracy (T, T), 0 to 1: in row t, on each task after task t; nan or anything where s > t.

    >>> Course(np.array([[0.9, 0.0], [0.7, 0.8]])).backward_transfer
    -0.2
    """

    accuracy: Floats

    @property
    def so_far(self) -> Floats:
        """Mean accuracy over the tasks learnt, after each of them: (T,)."""
        return np.array([np.nanmean(row[: step + 1]) for step, row in enumerate(self.accuracy)])

    @property
    def average_accuracy(self) -> float:
        """Mean accuracy over the tasks when all have been learnt."""
        return float(self.so_far[-1])

    @property
    def backward_transfer(self) -> float:
        """Mean change of a task's accuracy from when it was learnt to the end; below 0: forgetting; nan of one task.

        Lopez-Paz and Ranzato, NeurIPS 2017 (arXiv 1706.08840), BWT.
        """
        if len(self.accuracy) < 2:
            return float("nan")
        return float(np.nanmean((self.accuracy[-1] - self.accuracy.diagonal())[:-1]))
