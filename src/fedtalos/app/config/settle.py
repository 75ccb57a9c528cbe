"""Defaults that are worked out: what `auto` and unset options come to for given weights and device."""

from typing import Any, TypeVar

import torch

from fedtalos.app.config.rounds import local_epochs
from fedtalos.app.config.schema import (
    ADAPTIVE,
    AlgorithmOptions,
    CentralizedConfig,
    Config,
    EditingConfig,
    FederatedConfig,
    ModelOptions,
    TrainOptions,
)
from fedtalos.devices import Precision, choose_precision
from fedtalos.errors import InputError
from fedtalos.models.vision_transformer import Architecture
from fedtalos.models.weights import Weights
from fedtalos.notes import note

ConfigT = TypeVar("ConfigT", bound=Config)


def settle(config: ConfigT, weights: Weights | None, device: torch.device) -> ConfigT:
    """The config with `auto` and None settled (but for the head), so that what is recorded is what ran."""
    groups: dict[str, Any] = {
        "run": {"device": device.type, "precision": _precision(config, device)},
        "model": _model_defaults(config, config.model, weights),
    }
    if isinstance(config, CentralizedConfig | FederatedConfig):
        groups["train"] = _training_defaults(config, config.train, from_scratch=weights is None)
    if isinstance(config, FederatedConfig):
        groups["algorithm"] = _algorithm_defaults(config.algorithm)
        groups["federation"] = _one_round_defaults(config)
        if weights is None and config.apart.asked:
            note("start", "an untrained model, from which vectors seldom add up; --weights gives a trained one")
    settled = {name: getattr(config, name).model_copy(update=values) for name, values in groups.items()}
    return config.model_copy(update=settled)


def _precision(config: Config, device: torch.device) -> Precision:
    """The precision asked for; of auto, scores take float32 wherever they are computed."""
    asked = config.run.precision
    if not isinstance(config, EditingConfig) or asked != "auto":
        return choose_precision(asked, device)
    if device.type == "cuda":
        note(
            "precision",
            "scores are computed in strict float32, without bf16 and TF32, so that a mask does not depend on the card; "
            "--precision bf16 is faster and gives another mask",
        )
    return "fp32"


def _model_defaults(config: Config, options: ModelOptions, weights: Weights | None) -> dict[str, Any]:
    if weights is None:
        digits = config.data.dataset == "digits"  # 8 pixels a side
        size, pixels, patch = ("micro", 8, 2) if digits else ("small", 32, 4)
        return {
            "weights": "none",
            "model_size": options.model_size or size,
            "image_size": options.image_size or pixels,
            "patch_size": options.patch_size or patch,
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


def _one_round_defaults(config: FederatedConfig) -> dict[str, Any]:
    """A pass over its images for a client that trains once, where nobody said how long."""
    epochs = local_epochs(config)
    if epochs == config.federation.local_epochs:
        return {}
    note("local epochs", f"{epochs}: every client trains once; --local_epochs or --local_steps says how long")
    return {"local_epochs": epochs}


def _algorithm_defaults(options: AlgorithmOptions) -> dict[str, Any]:
    name, values = options.algorithm, dict[str, Any]()
    if name in ("fedavgm", "scaffold", *ADAPTIVE) and options.server_learning_rate is None:
        values["server_learning_rate"] = 1e-3 if name in ADAPTIVE else 1.0
    if name in ("fedavgm", *ADAPTIVE) and options.server_momentum is None:
        values["server_momentum"] = 0.0 if name == "fedadagrad" else 0.9
    return values
