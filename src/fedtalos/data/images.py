"""Labelled images: a whole set of them, on one device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """uint8 pixels (N, 3, H, W) and int64 labels (N,), on one device; and whose they are, where the data say so.

    >>> images = LabelledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    >>> images
    LabelledImages(2 of (3, 8, 8) on cpu)
    """

    pixels: Tensor
    labels: Tensor
    owners: Tensor | None = None
    """Client of each image as the data have it, int64 (N,), numbered from 0; None: the data know no clients."""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"LabelledImages({len(self)} of {tuple(self.pixels.shape[1:])} on {self.pixels.device})"

    def subset(self, indices: Tensor | NDArray[np.int64]) -> "LabelledImages":
        """Copy the images at ``indices`` (n,), in that order."""
        at = torch.as_tensor(indices, device=self.labels.device)
        return LabelledImages(self.pixels[at], self.labels[at], None if self.owners is None else self.owners[at])

    def slice(self, start: int, count: int | None) -> "LabelledImages":
        """View ``count`` images (None: all) from number ``start`` on; nothing is copied."""
        end = None if count is None else start + count
        owners = None if self.owners is None else self.owners[start:end]
        return LabelledImages(self.pixels[start:end], self.labels[start:end], owners)

    def to(self, device: torch.device | str) -> "LabelledImages":
        """Put pixels and labels on a device."""
        owners = None if self.owners is None else self.owners.to(device)
        return LabelledImages(self.pixels.to(device), self.labels.to(device), owners)


@dataclass(frozen=True, eq=False)
class Published:
    """A data set as it comes: class names, training images, and test and validation images where it has them.

    >>> Published(("cat", "dog"), images).test is None
    True
    """

    classes: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages | None = None
    val: LabelledImages | None = None
