"""Activations of a model's frozen first stages, computed once per image.

Shapes: N images, T tokens, D width; an image's activations are (T, D) after a block, (D,) after the last stage.
"""

from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.data.batches import View
from fedtalos.data.images import LabelledImages
from fedtalos.models.backbone import Backbone
from fedtalos.training.loop import Precision, autocast


class ActivationCache:
    """What the first ``passed`` stages make of each image: (N, T, D) or (N, D) float32, filled as it is asked for.

    It lies on the images' device; where it takes more than ``limit`` bytes, in a file (mapped into memory) that goes
    when the process does.
    """

    def __init__(
        self,
        model: Backbone,
        passed: int,
        images: LabelledImages,
        view: View,
        *,
        batch_size: int,
        precision: Precision,
        limit: float,
        folder: Path,
    ) -> None:
        self._model, self.passed, self._images, self._view = model, passed, images, view
        self._batch_size, self._precision = batch_size, precision
        self._there = np.zeros(len(images), dtype=np.bool_)
        shape = (len(images), *self._compute(torch.arange(1)).shape[1:])
        size = 4 * int(np.prod(shape))
        self.bytes_in_memory = size if size <= limit else 0
        if self.bytes_in_memory:
            values = torch.empty(shape, device=images.pixels.device)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder, prefix="activations-") as file:  # its name goes now, its space later
                values = torch.from_file(file.name, shared=True, size=size // 4).view(shape)
        self.activations = LabelledImages(values, images.labels.to(values.device))

    def fill(self, indices: NDArray[np.int64]) -> None:
        """Compute what is missing, in batches of these indices alone.

        An image's last bits can depend on the images beside it: who asks for the same sets gets the same bits.
        """
        missing = indices[~self._there[indices]]
        for start in range(0, len(missing), self._batch_size):
            batch = torch.from_numpy(missing[start : start + self._batch_size])
            values = self.activations.pixels
            values[batch.to(values.device)] = self._compute(batch).to(values.device)
        self._there[missing] = True

    def to_device(self, activations: Tensor) -> Tensor:
        """Stored activations, where the model is."""
        return activations.to(self._images.pixels.device)

    @torch.no_grad()
    def _compute(self, indices: Tensor) -> Tensor:
        pixels = self._view(self._images.pixels[indices.to(self._images.pixels.device)])
        with autocast(pixels.device, self._precision):
            return self._model.run(pixels, 0, self.passed).float()
