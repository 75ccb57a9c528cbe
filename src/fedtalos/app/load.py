"""From a config to what every experiment starts from: device, images, model and mask."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedtalos.app.algorithms import settled
from fedtalos.app.config.schema import (
    CentralizedConfig,
    Config,
    EditingConfig,
    FederatedConfig,
    ModelOptions,
    TrainOptions,
)
from fedtalos.app.setup import Setup
from fedtalos.checkpoint import find_checkpoint, load_checkpoint
from fedtalos.data.batches import View
from fedtalos.data.dataset_loader import Dataset, load_dataset
from fedtalos.devices import choose_device, choose_precision
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.head_file import HEADS, read_head, set_head
from fedtalos.models.library_model import ForeignArchitecture, ForeignModel
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.pixels import HALF, STATISTICS
from fedtalos.models.weights.read import Weights, load_into, read_weights
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.mask_file import load_mask

ConfigT = TypeVar("ConfigT", bound=Config)


def starting_weights(config: Config) -> Weights | None:
    """The weights that the config names; None: from scratch."""
    options, checkpoints = config.model, config.run.output_dir / "checkpoints"
    if isinstance(config, EditingConfig) and config.editing.checkpoint is not None:
        return checkpoint_weights(find_checkpoint(config.editing.checkpoint, checkpoints))
    if options.weights == "none":
        return None
    if options.weights.endswith(".json") or (checkpoints / options.weights / "last.json").exists():
        return checkpoint_weights(find_checkpoint(Path(options.weights), checkpoints))
    return read_weights(options.weights, options.model_size or "small", normalisation=options.normalisation)


def checkpoint_weights(path: Path) -> Weights:
    """A checkpoint of ours as weights to start from."""
    checkpoint = load_checkpoint(path)
    facts = checkpoint.facts
    try:
        return Weights(
            tensors={name: tensor for name, tensor in checkpoint.tensors.items() if "/" not in name},
            architecture=_architecture(facts["model"]),
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            source=str(path),
            sha256=checkpoint.sha256,
            classes=tuple(facts["classes"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path}: holds no model, or is of another version; give another") from error


def resolve(config: ConfigT, weights: Weights | None, device: torch.device) -> ConfigT:
    """The config with `auto` and None settled (but for the head), so that what is recorded is what ran."""
    groups: dict[str, Any] = {
        "run": {"device": device.type, "precision": choose_precision(config.run.precision, device)},
        "model": _model_defaults(config.model, weights),
    }
    if isinstance(config, CentralizedConfig | FederatedConfig):
        groups["train"] = _training_defaults(config, config.train, from_scratch=weights is None)
    settled_groups = {name: getattr(config, name).model_copy(update=values) for name, values in groups.items()}
    if isinstance(config, FederatedConfig):
        settled_groups["algorithm"] = settled(config.algorithm)
    return config.model_copy(update=settled_groups)


def _model_defaults(options: ModelOptions, weights: Weights | None) -> dict[str, Any]:
    if weights is None:
        return {
            "model_size": options.model_size or "small",
            "image_size": options.image_size or 32,
            "patch_size": options.patch_size or 4,
        }
    theirs = weights.architecture
    has: dict[str, Any] = {"model_size": None, "patch_size": None}  # what is no ViT of ours has neither
    if isinstance(theirs, Architecture):
        has = {"model_size": theirs.size, "patch_size": theirs.patch_size}
    for flag, asked in (("model_size", options.model_size), ("patch_size", options.patch_size)):
        if asked not in (None, has[flag]):
            raise InputError(f"--{flag} {asked}: {weights.source} is a {theirs}; leave it out")
    return has | {"image_size": options.image_size or theirs.image_size}


def _training_defaults(config: Config, train: TrainOptions, *, from_scratch: bool) -> dict[str, Any]:
    rate = 1e-3 if from_scratch or train.mask else 1e-4  # docs/results.md: 3e-4 is slow under a mask
    # Digits fill their 8 pixels; where the head alone learns, features of plain images are computed once.
    plain = config.data.dataset == "digits" or train.trainable == "head"
    augmentation = "none" if plain else "crop_flip"
    return {
        "learning_rate": train.learning_rate or (rate if train.optimizer == "adamw" else 10 * rate),
        "augmentation": augmentation if train.augmentation == "auto" else train.augmentation,
        "eval_every": train.eval_every or (10 if isinstance(config, FederatedConfig) else 1),
        **(_head_defaults(config, train) if config.model.head == "linear" else {}),
    }


def _head_defaults(config: Config, train: TrainOptions) -> dict[str, Any]:
    return {
        "head_rounds": train.head_rounds or (100 if isinstance(config, FederatedConfig) else 10),
        "head_learning_rate": train.head_learning_rate or 0.1,
    }


def prepare(config: ConfigT) -> tuple[ConfigT, Setup]:
    """The resolved config, with its device, images, model and mask; what is quick to check comes first.

    The head is as the weights or a file have it, or random; where one is to be fitted, that is the caller's to do.
    """
    device = choose_device(config.run.device)
    weights = starting_weights(config)
    config = resolve(config, weights, device)
    options, mask = config.model, None
    if isinstance(config, CentralizedConfig | FederatedConfig) and config.train.mask is not None:
        mask = load_mask(config.train.mask)
    assert options.image_size is not None
    architecture: Architecture | ForeignArchitecture
    if weights is not None:
        architecture = replace(weights.architecture, image_size=options.image_size)
    else:
        assert options.model_size is not None
        assert options.patch_size is not None
        architecture = Architecture(options.model_size, options.image_size, options.patch_size, num_classes=0)
    dataset = _load_images(config, options.image_size)
    model = _model(replace(architecture, num_classes=len(dataset.classes)), config.run.seed)
    default_head = "ridge" if isinstance(config, EditingConfig) else "random"
    head = _load_weights(model, weights, options.head, dataset.classes, default_head)
    mean, std = STATISTICS.get(options.normalisation) or ((weights.mean, weights.std) if weights else HALF)
    setup = Setup(
        device=device,
        precision="bf16" if config.run.precision == "bf16" else "fp32",
        dataset=dataset.to(device),
        model=model.to(device),
        view=View(options.image_size, mean, std),
        weights=weights.sha256 if weights else _drawn(config.run.seed, options),
        weights_origin={"source": weights.source, "sha256": weights.sha256} if weights else {"source": "none"},
        head=head,
        mask=mask,
        eval_batch_size=config.data.eval_batch_size,
        eval_limit=config.data.eval_limit,
        cache_bytes=config.data.cache_gb * 1e9,
        cache_folder=config.run.output_dir,
    )
    return config.model_copy(update={"model": options.model_copy(update={"head": head})}), setup


def _architecture(facts: dict[str, Any]) -> Architecture | ForeignArchitecture:
    """What a checkpoint says of its model."""
    return ForeignArchitecture(**facts) if "name" in facts else Architecture(**facts)


def _model(architecture: Architecture | ForeignArchitecture, seed: int) -> Backbone:
    generator = torch_generator(seed, "weights")
    if isinstance(architecture, Architecture):
        return VisionTransformer(architecture, generator)
    return ForeignModel(architecture, generator)


def _drawn(seed: int, options: ModelOptions) -> str:
    """What fixes weights that were not loaded: draws come in the order of the tensors, so their sizes count too."""
    return f"none, seed {seed}, {options.model_size}/{options.patch_size} at {options.image_size} px"


def _load_images(config: Config, image_size: int) -> Dataset:
    data = config.data
    dataset = load_dataset(
        data.dataset,
        data.data_dir,
        val_fraction=data.val_fraction,
        calibration_fraction=data.calibration_fraction,
        seed=data.split_seed,
        image_size=image_size,
    )
    if data.train_skip >= len(dataset.train):
        raise InputError(f"--train_skip {data.train_skip}: there are only {len(dataset.train)} training images")
    return replace(dataset, train=dataset.train.slice(data.train_skip, data.train_limit))


def _load_weights(model: Backbone, weights: Weights | None, head: str, classes: tuple[str, ...], default: str) -> str:
    """Load the backbone, and the head where it is wanted and fits; returns where the head comes from.

    `auto` takes the weights' head only where its classes are known to be these: a count alone says little.
    """
    initial = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    fits = weights is not None and not load_into(model, weights) and weights.classes in (None, classes)
    if head == "weights" and not fits:
        raise InputError(
            f"--head weights: they hold no head for these classes; use {', '.join(HEADS[1:])} or a head file"
        )
    if head == "auto":
        head = "weights" if fits and weights is not None and weights.classes is not None else default
    if head in HEADS[1:]:
        model.head.load_state_dict(initial)
    elif head != "weights":
        set_head(model, *read_head(Path(head), model))
    return head
