"""From a config to what every experiment starts from: device, images, model, and what of it may move."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from fedtalos.config import CentralizedConfig, Config, EditingConfig, FederatedConfig, TrainOptions
from fedtalos.data.batches import View, evaluation_batches, training_batches
from fedtalos.data.dataset_loader import Dataset, load_dataset
from fedtalos.data.images import LabelledImages
from fedtalos.devices import choose_device, choose_precision
from fedtalos.errors import InputError
from fedtalos.head import read_head, set_head
from fedtalos.metrics import Metrics
from fedtalos.models.pretrained import Weights, load_into, read_weights
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.parameters import Entries
from fedtalos.randomness import torch_generator
from fedtalos.training.evaluation import evaluate, extract_features
from fedtalos.training.heads import RidgeSums, fit_ridge_head, ridge_sums
from fedtalos.training.local import Batches, Precision, train

HALF = (0.5, 0.5, 0.5)

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass
class Setup:
    """What an experiment works with: the one resident model, images on its device, where weights and head are from."""

    device: torch.device
    precision: Precision
    dataset: Dataset
    model: VisionTransformer
    view: View
    weights: str
    head: str
    eval_batch_size: int
    eval_limit: int | None

    def evaluate(self, images: LabelledImages) -> Metrics:
        """Loss and accuracy of the resident model, on the first ``eval_limit`` images."""
        batches = evaluation_batches(self.limited(images), self.view, self.eval_batch_size)
        return evaluate(self.model, batches, self.precision)

    def limited(self, images: LabelledImages) -> LabelledImages:
        """The first ``eval_limit`` images, or all."""
        return images.subset(torch.arange(len(images))[: self.eval_limit])

    def features(self, images: LabelledImages) -> tuple[Tensor, Tensor]:
        """Backbone features (N, D) and labels (N,)."""
        batches = evaluation_batches(images, self.view, self.eval_batch_size)
        return extract_features(self.model, batches, self.precision)

    def head_sums(self, images: LabelledImages) -> RidgeSums:
        """What the holder of ``images`` sends for a ridge head."""
        return ridge_sums(*self.features(images), len(self.dataset.classes))

    def fit_head(self, sums: RidgeSums) -> None:
        """Put the ridge head of ``sums`` on the model, its penalty and temperature chosen on validation images."""
        set_head(self.model, *fit_ridge_head(sums, *self.features(self.limited(self.dataset.val))))

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
        watch: Callable[[Batches], Batches],
    ) -> Metrics:
        """``steps`` optimiser steps on the training images at ``indices``, in an order drawn from ``rng``."""
        assert options.augmentation != "auto"
        batches = training_batches(
            self.dataset.train,
            indices,
            self.view,
            steps=steps,
            batch_size=options.batch_size,
            augmentation=options.augmentation,
            rng=rng,
        )
        return train(
            self.model,
            watch(batches),
            optimizer,
            entries,
            learning_rate=learning_rate,
            clip_norm=options.clip_norm,
            precision=self.precision,
        )

    def facts(self) -> dict[str, Any]:
        """What a checkpoint needs, beside its tensors, to be used again."""
        return {
            "model": self.model.architecture.as_dict(),
            "mean": self.view.mean,
            "std": self.view.std,
            "weights": self.weights,
            "classes": self.dataset.classes,
        }


def starting_weights(config: Config) -> Weights | None:
    """The weights that the config names; None: from scratch."""
    options = config.model
    checkpoints = config.run.output_dir / "checkpoints"
    if isinstance(config, EditingConfig) and config.editing.checkpoint is not None:
        path = find_checkpoint(config.editing.checkpoint, checkpoints)
        return checkpoint_weights(load_checkpoint(path), path)
    if options.weights == "none":
        return None
    if options.weights.endswith(".json") or Path(options.weights).is_dir():
        path = find_checkpoint(Path(options.weights), checkpoints)
        return checkpoint_weights(load_checkpoint(path), path)
    return read_weights(options.weights, options.model_size, normalisation=options.normalisation)


def checkpoint_weights(checkpoint: Checkpoint, path: Path) -> Weights:
    """A checkpoint of ours as weights to start from."""
    facts = checkpoint.facts
    try:
        return Weights(
            tensors={name: tensor for name, tensor in checkpoint.tensors.items() if "/" not in name},
            **facts["model"],
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            source=str(path),
            sha256=checkpoint.sha256,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path}: broken or not a fedtalos checkpoint ({error} missing)") from error


def _resolve(config: ConfigT, weights: Weights | None) -> ConfigT:
    """The config with `auto` and None settled (but for the head), so that what is recorded is what ran."""
    options = config.model
    device = choose_device(config.run.device)
    groups: dict[str, Any] = {
        "run": {"device": device.type, "precision": choose_precision(config.run.precision, device)},
        "model": {
            "model_size": weights.size if weights else options.model_size,
            "image_size": options.image_size or (weights.image_size if weights else 32),
            "patch_size": options.patch_size or (weights.patch_size if weights else 4),
        },
    }
    if isinstance(config, CentralizedConfig | FederatedConfig):
        groups["train"] = _training_defaults(config, config.train, from_scratch=weights is None)
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in groups.items()}
    )


def _training_defaults(config: Config, train: TrainOptions, *, from_scratch: bool) -> dict[str, Any]:
    rate = 1e-3 if from_scratch else 3e-4 if train.mask else 1e-4
    augmentation = "none" if config.data.dataset == "digits" else "crop_flip"  # digits fill their 8 pixels
    return {
        "learning_rate": train.learning_rate or (rate if train.optimizer == "adamw" else 10 * rate),
        "augmentation": augmentation if train.augmentation == "auto" else train.augmentation,
        "eval_every": train.eval_every or (10 if isinstance(config, FederatedConfig) else 1),
    }


def prepare(config: ConfigT) -> tuple[ConfigT, Setup]:
    """The resolved config, with its device, images and model.

    The head is as the weights or a file have it, or random; a ridge head is the caller's to fit, on what it may see.
    """
    weights = starting_weights(config)
    config = _resolve(config, weights)
    device, options = torch.device(config.run.device), config.model
    assert options.image_size is not None
    assert options.patch_size is not None
    dataset = _load_images(config, options.image_size)
    architecture = Architecture(options.model_size, options.image_size, options.patch_size, len(dataset.classes))
    model = VisionTransformer(architecture, torch_generator(config.run.seed, "weights"))
    head = _load_weights(model, weights, options.head, default="ridge" if config.command == "editing" else "random")
    config = config.model_copy(update={"model": options.model_copy(update={"head": head})})
    return config, Setup(
        device=device,
        precision=choose_precision(config.run.precision, device),
        dataset=dataset.to(device),
        model=model.to(device),
        view=View(options.image_size, weights.mean if weights else HALF, weights.std if weights else HALF),
        weights=weights.sha256 if weights else f"none, seed {config.run.seed}",
        head=head,
        eval_batch_size=config.data.eval_batch_size,
        eval_limit=config.data.eval_limit,
    )


def _load_images(config: Config, image_size: int) -> Dataset:
    data = config.data
    dataset = load_dataset(
        data.dataset,
        data.data_dir,
        val_fraction=data.val_fraction,
        calibration_fraction=data.calibration_fraction,
        seed=config.run.seed,
        image_size=image_size,
    )
    end = None if data.train_limit is None else data.train_skip + data.train_limit
    chosen = torch.arange(len(dataset.train))[data.train_skip : end]
    if len(chosen) == 0:
        raise InputError(f"--train_skip {data.train_skip}: there are only {len(dataset.train)} training images")
    return replace(dataset, train=dataset.train.subset(chosen))


def _load_weights(model: VisionTransformer, weights: Weights | None, head: str, default: str) -> str:
    """Load the backbone, and the head where it is wanted and fits; returns where the head comes from."""
    initial = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    came_along = weights is not None and not load_into(model, weights)
    if head == "weights" and not came_along:
        raise InputError("--head weights: they hold no head for these classes; use random, ridge or a head file")
    if head == "auto":
        head = "weights" if came_along else default
    if head in ("random", "ridge"):
        model.head.load_state_dict(initial)
    elif head != "weights":
        set_head(model, *read_head(Path(head), model))
    return head
