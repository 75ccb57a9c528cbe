"""What an experiment works with: the resident model, images on its device, and what is done with both."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.app.config.schema import TrainOptions
from fedtalos.app.run.interruption import with_safe_points
from fedtalos.data.batches import View, evaluation_batches, training_batches
from fedtalos.data.dataset_loader import Dataset
from fedtalos.data.images import LabelledImages
from fedtalos.metrics import Metrics
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.mask_file import Mask, MaskFacts, fingerprint
from fedtalos.training.evaluation import answers_by_class, evaluate_batches
from fedtalos.training.feature_cache import ActivationCache
from fedtalos.training.loop import Adjust, BadUpdateError, Batches, Precision, freeze_all_but, train
from fedtalos.training.masked_parameters import Entries
from fedtalos.training.micro_batches import MicroBatch


@dataclass(frozen=True)
class Source:
    """Stored images or activations, how they become what ``forward`` takes, and ``forward``: from there to logits."""

    images: LabelledImages
    view: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]


@dataclass
class Setup:
    """What an experiment works with: the one resident model, images on its device, and where they are from."""

    device: torch.device
    precision: Precision
    dataset: Dataset
    model: Backbone
    view: View
    weights: str
    weights_origin: dict[str, str]
    head: str
    mask: tuple[Mask, MaskFacts] | None
    eval_batch_size: int
    eval_limit: int | None
    cache_bytes: float
    cache_folder: Path
    frozen_stages: int = 0
    micro_batch: MicroBatch = field(default_factory=lambda: MicroBatch(Console(stderr=True).print))
    _caches: dict[str, ActivationCache] = field(default_factory=dict)

    def evaluate(self, split: str) -> Metrics:
        """Loss and accuracy of the resident model on that split, its first ``eval_limit`` images."""
        return sum(self.evaluate_part(split, 0, 1), Metrics())

    def evaluate_part(self, split: str, first: int, every: int) -> list[Metrics]:
        """The metrics of batches first, first + every, ... of the split."""
        images, size = self.limited(getattr(self.dataset, split)), self.eval_batch_size
        positions = np.arange(len(images))
        parts = [positions[start : start + size] for start in range(first * size, len(images), every * size)]
        source = self._source(split, images, parts)
        batches = evaluation_batches(source.images, source.view, size, first=first, every=every)
        return evaluate_batches(self.model, with_safe_points(batches), self.precision, source.forward)

    def _source(self, split: str, images: LabelledImages, asked: Iterable[NDArray[np.int64]]) -> "Source":
        """The images themselves, or what the frozen stages make of those ``asked`` for, a batch or client at a time."""
        if not self.frozen_stages or split == "test":  # which is read once or twice
            return Source(images, self.view, self.model)
        cache = self._cache(split, images, self.frozen_stages)
        for indices in asked:
            cache.fill(indices)
        return Source(cache.activations, cache.to_device, partial(self.model, passed=self.frozen_stages))

    def _cache(self, split: str, images: LabelledImages, passed: int) -> ActivationCache:
        """What the first ``passed`` stages make of the split's images; one after other stages is dropped for it."""
        if split in self._caches and self._caches[split].passed != passed:
            del self._caches[split]
        if split not in self._caches:
            self._caches[split] = ActivationCache(
                self.model,
                passed,
                images,
                self.view,
                batch_size=self.eval_batch_size,
                precision=self.precision,
                limit=self.cache_bytes - sum(cache.bytes_in_memory for cache in self._caches.values()),
                folder=self.cache_folder,
            )
        return self._caches[split]

    def answers_by_class(self, split: str, classes: NDArray[np.int64]) -> Tensor:
        """Correct answers to, and number of, the split's images of each class, int64 (2, C): of ``classes``, else 0."""
        images = self.limited(getattr(self.dataset, split))
        wanted = torch.isin(images.labels, torch.as_tensor(classes, device=images.labels.device))
        batches = evaluation_batches(images.subset(wanted.nonzero().squeeze(1)), self.view, self.eval_batch_size)
        return answers_by_class(self.model, batches, len(self.dataset.classes), self.precision)

    def limited(self, images: LabelledImages) -> LabelledImages:
        """The first ``eval_limit`` images, or all."""
        return images.slice(0, self.eval_limit)

    def features(self, split: str, indices: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """What the head sees of the split's images at ``indices``, (N, D), and labels (N,); kept while it holds.

        None: of all, but of validation the first ``eval_limit``.
        """
        images = self.limited(self.dataset.val) if split == "val" else getattr(self.dataset, split)
        cache = self._cache(split, images, len(self.model.stages))
        indices = np.arange(len(images)) if indices is None else indices
        cache.fill(indices)
        features = cache.activations.subset(indices)
        return features.pixels, features.labels

    def let_move(self, entries: Entries) -> None:
        """Freeze all but ``entries``; what frozen first stages make of plain images is computed once from here on."""
        freeze_all_but(self.model, entries)
        frozen = self.model.frozen_stages(entries.masks)
        # A ViT's embedding alone is cheaper to compute than to keep; features are worth it always.
        self.frozen_stages = frozen if frozen > 1 or frozen == len(self.model.stages) else 0
        self._caches = {split: cache for split, cache in self._caches.items() if cache.passed == self.frozen_stages}

    def train_on(
        self,
        indices: NDArray[np.int64],
        steps: int,
        optimizer: Optimizer,
        entries: Entries,
        options: TrainOptions,
        *,
        rng: np.random.Generator,
        learning_rate: Callable[[int], float],
        where: str = "",
        watch: Callable[[Batches], Batches] = lambda batches: batches,
        first: int = 0,
        adjust: Adjust | None = None,
    ) -> Metrics:
        """Optimiser steps ``first`` to ``steps`` - 1 on the training images at ``indices``, in an order of ``rng``.

        Raises BadUpdateError, saying ``where`` in the run, if training diverges.
        """
        assert options.augmentation != "auto"
        images = self.dataset.train
        source = Source(images, self.view, self.model)
        if options.augmentation == "none":
            source = self._source("train", images, [indices])
        batches = training_batches(
            source.images,
            indices,
            source.view,
            steps=steps,
            batch_size=options.batch_size,
            augmentation=options.augmentation,
            rng=rng,
            first=first,
        )
        try:
            return train(
                self.model,
                watch(batches),
                optimizer,
                entries,
                learning_rate=learning_rate,
                clip_norm=options.clip_norm,
                precision=self.precision,
                forward=source.forward,
                adjust=adjust,
                micro_batch=self.micro_batch,
            )
        except BadUpdateError as error:
            raise BadUpdateError(f"{where}: {error}" if where else str(error)) from error

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the run reads, by what it is."""
        mask = {} if self.mask is None else {"mask": fingerprint(self.mask[0])}
        return {"data": self.dataset.fingerprint, "weights": self.weights, **mask}

    def origin(self) -> dict[str, dict[str, str]]:
        """What config.yaml says of where the weights are from, and of what the run reads."""
        return {"weights": self.weights_origin, "inputs": self.inputs()}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint needs, beside its tensors, to be used again."""
        return {
            "model": self.model.architecture.as_dict(),
            "mean": self.view.mean,
            "std": self.view.std,
            "weights": self.weights,
            "classes": self.dataset.classes,
        }
