"""A set of labelled images, whole, on one device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """uint8 pixels (N, 3, H, W) and int64 labels (N,), on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | NDArray[np.int64]) -> "LabelledImages":
        """The images at ``indices`` (n,), in that order."""
        at = torch.as_tensor(indices, device=self.labels.device)
        return LabelledImages(self.pixels[at], self.labels[at])

    def slice(self, start: int, count: int | None) -> "LabelledImages":
        """``count`` images (None: all) from ``start`` on: a view, no copy."""
        end = None if count is None else start + count
        return LabelledImages(self.pixels[start:end], self.labels[start:end])

    def to(self, device: torch.device | str) -> "LabelledImages":
        return LabelledImages(self.pixels.to(device), self.labels.to(device))
