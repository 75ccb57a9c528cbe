"""Features of a model's frozen first stages, computed once per image and kept.

Shapes: N images, T tokens, D width; an image's features are (T, D) after a block, (D,) after the last stage.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

import numpy as np
import torch
from torch import Tensor

from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.data.view import View
from fedtalos.devices import Precision, distinct_places
from fedtalos.files import naming
from fedtalos.models.backbone import Backbone
from fedtalos.training.engine.capture import Compile
from fedtalos.training.engine.forward import features_of


@dataclass(frozen=True)
class Source:
    """Stored images or features, how they become what ``forward`` takes, and ``forward``: from there to logits."""

    images: LabelledImages
    view: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]


def view_of(model: Backbone) -> View:
    """Make the view that turns stored pixels into what the model takes."""
    size, device = model.architecture.image_size, next(model.parameters()).device
    return View(size, model.mean, model.std, device, interpolation=model.interpolation, crop=model.crop)


def plain_source(model: Backbone, images: LabelledImages) -> Source:
    """The images themselves, through the whole model."""
    return Source(images, view_of(model), model)


class FeatureStore:
    """Keeps what frozen first stages make of images: up to ``limit`` bytes in memory, the rest in a file of ``folder``.

    Features are computed in batches of ``batch_size``, in ``precision``; with ``compile`` graph or on through a CUDA
    graph, where that is possible. Files are mapped into memory, have no name, and go when the process does; without a
    ``folder`` they lie where the system keeps temporary files.

    >>> store = FeatureStore(limit=2e9)
    >>> moving = MaskedParameters(model, mask, features=store)
    """

    def __init__(
        self,
        limit: float = 1e9,
        folder: Path | None = None,
        *,
        batch_size: int = 250,
        precision: Precision = "fp32",
        compile: Compile = "off",
    ) -> None:
        self._limit, self._folder = limit, folder or Path(gettempdir())
        self._batch_size, self._precision, self._compile = batch_size, precision, compile
        self._caches: dict[object, FeatureCache] = {}

    def source(self, model: Backbone, images: LabelledImages, passed: int, asked: Iterable[Ids]) -> Source:
        """The images where ``passed`` is 0, else what the first ``passed`` stages make of those ``asked`` for.

        ``asked`` are the sets of images that go through the model together, a batch or a client at a time.
        """
        if not passed:
            return plain_source(model, images)
        cache = self._cache(model, images, passed)
        for ids in asked:
            cache.fill(ids)
        return Source(cache.features, cache.to_device, partial(model, passed=passed))

    def features(self, model: Backbone, images: LabelledImages, ids: Ids | None = None) -> tuple[Tensor, Tensor]:
        """Features that the head sees of the images at ``ids`` (None: of all), (N, D), and their labels (N,)."""
        cache = self._cache(model, images, len(model.stages))
        ids = np.arange(len(images)) if ids is None else ids
        cache.fill(ids)
        found = cache.features.subset(ids)
        return found.pixels, found.labels

    def keep_only(self, passed: int) -> None:
        """Drop what other numbers of stages made: to be called when other parameters begin to move."""
        self._caches = {key: cache for key, cache in self._caches.items() if cache.passed == passed}

    def _cache(self, model: Backbone, images: LabelledImages, passed: int) -> "FeatureCache":
        """Find the cache of the images after ``passed`` stages; one of other stages or values is dropped for it."""
        # a view of the same images is the same
        key = (images.pixels.data_ptr(), images.labels.data_ptr(), images.pixels.shape)
        if key in self._caches and not self._caches[key].is_of(model, passed):
            del self._caches[key]
        if key not in self._caches:
            limit = self._limit - sum(cache.bytes_in_memory for cache in self._caches.values())
            self._caches[key] = FeatureCache(
                model,
                passed,
                images,
                batch_size=self._batch_size,
                precision=self._precision,
                compile=self._compile,
                limit=limit,
                folder=self._folder,
            )
        return self._caches[key]


class FeatureCache:
    """Outputs of the first ``passed`` stages for each image: (N, T, D) or (N, D) float32, filled as it is asked for.

    It lies on the images' device; where it takes more than ``limit`` bytes, in a file (mapped into memory) that goes
    when the process does.
    """

    def __init__(
        self,
        model: Backbone,
        passed: int,
        images: LabelledImages,
        *,
        batch_size: int,
        precision: Precision,
        compile: Compile = "off",
        limit: float,
        folder: Path,
    ) -> None:
        self._model, self.passed, self._images, self._view = model, passed, images, view_of(model)
        self._batch_size, self._forward = batch_size, partial(features_of, model, passed, precision, compile)
        self._versions = _versions(model, passed)
        self._there = np.zeros(len(images), dtype=np.bool_)
        shape = (len(images), *self._compute(torch.arange(1)).shape[1:])
        size = 4 * int(np.prod(shape))
        self.bytes_in_memory = size if size <= limit else 0
        if self.bytes_in_memory:
            values = torch.empty(shape, device=images.pixels.device)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            values = _mapped(folder, size).view(shape)
        self.features = LabelledImages(values, images.labels.to(values.device))

    def is_of(self, model: Backbone, passed: int) -> bool:
        """Tell whether these are features of the model's first ``passed`` stages, which have not been written since."""
        return self._model is model and self.passed == passed and self._versions == _versions(model, passed)

    def fill(self, indices: Ids) -> None:
        """Compute what is missing, in batches of these indices alone.

        An image's last bits can depend on the images beside it: who asks for the same sets gets the same bits.
        """
        missing = indices[~self._there[indices]]
        for start in range(0, len(missing), self._batch_size):
            batch = torch.from_numpy(missing[start : start + self._batch_size])
            values = self.features.pixels
            computed = self._compute(batch).to(values.device)
            with distinct_places():
                values[batch.to(values.device)] = computed
        self._there[missing] = True

    def to_device(self, features: Tensor) -> Tensor:
        """Stored features, where the model is."""
        return features.to(next(self._model.parameters()).device)

    def _compute(self, indices: Tensor) -> Tensor:
        pixels = self._view(self._images.pixels[indices.to(self._images.pixels.device)])
        return self._forward()(pixels)


def _mapped(folder: Path, size: int) -> Tensor:
    """float32 values in ``size`` bytes of a file in ``folder`` that has no name, so that nothing of it can stay.

    Raises OSError, which names folder and size, where there is no room: a disk that fills up under a mapped file would
    kill the process, without a word.
    """
    if size == 0:
        return torch.empty(0)
    room = Path(f"{folder.resolve()} ({size / 1e6:.1f} MB for kept activations)")
    with naming(room, instead_of=folder), TemporaryFile(dir=folder) as file:
        _reserve(file.fileno(), size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its room on the disk: by asking for it where the file system can be asked, else by writing zeros."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        else:
            return
    zeros = bytes(min(size, 2**20))
    for start in range(0, size, len(zeros)):
        written, part = 0, memoryview(zeros)[: size - start]
        while written < len(part):
            written += os.write(descriptor, part[written:])
    os.fsync(descriptor)  # some file systems look for room only now


def _versions(model: Backbone, passed: int) -> list[int]:
    """Count how often each parameter of the first ``passed`` stages was written to, as torch does."""
    return [p._version for name, p in model.named_parameters() if model.frozen_stages([name]) < passed]
