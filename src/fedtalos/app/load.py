"""Loading: from a config to what every experiment starts from, images, a model, and what may move of it."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from fedtalos.app.config.schema import CentralizedConfig, Config, EditingConfig, FederatedConfig, ModelOptions
from fedtalos.app.config.settle import settle
from fedtalos.app.given_clients import count_given_clients
from fedtalos.app.run.bars import bar
from fedtalos.app.starting_head import choose_head, freeze_fitted_head
from fedtalos.checkpoint import find_checkpoint
from fedtalos.data.class_names import check_same_classes
from fedtalos.data.dataset_loader import Dataset, load_dataset
from fedtalos.data.images import LabelledImages
from fedtalos.data.view import View
from fedtalos.devices import choose_device
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import HEADS, read_head, set_head
from fedtalos.models.library_model import LibraryArchitecture
from fedtalos.models.load import build_model, model_with_weights, resizing_of
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights import Weights
from fedtalos.models.weights.checkpoints import checkpoint_weights, resizing_facts
from fedtalos.models.weights.pixels import STATISTICS
from fedtalos.models.weights.read import load_weights
from fedtalos.notes import note
from fedtalos.training.editing.mask_facts import MaskFacts, fingerprint
from fedtalos.training.editing.mask_file import check_mask, read_mask_file
from fedtalos.training.entries import Mask
from fedtalos.training.feature_cache import FeatureStore

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Loaded(Generic[ConfigT]):
    """Images, model and mask of an experiment; ``config`` is resolved, so that what is recorded is what ran.

    ``config.model.head`` says which head the run is to have. The model has it already where it is the weights' own,
    random or a file's; one that is to be fitted (ridge, ncm, linear) is the experiment's to fit.
    """

    config: ConfigT
    data: Dataset
    model: Backbone
    mask: tuple[Mask, MaskFacts] | None
    features: FeatureStore

    @property
    def device(self) -> torch.device:
        """Device of the model and the images."""
        return self.data.train.pixels.device

    def limited(self, split: str) -> LabelledImages:
        """A split's first ``eval_limit`` images, or all."""
        images: LabelledImages = getattr(self.data, split)
        return images.slice(0, self.config.data.eval_limit)

    def origin(self) -> dict[str, dict[str, Any]]:
        """Sources of the weights and fingerprints of all that the run reads: config.yaml's made_by."""
        origin = self.model.origin
        source: dict[str, Any] = {"source": origin.source}
        if origin.source != "none":
            pixels = {"mean": list(self.model.mean), "std": list(self.model.std)}
            source |= {"sha256": origin.fingerprint, **pixels, **resizing_facts(self.model)}
        mask = {} if self.mask is None else {"mask": fingerprint(self.mask[0])}
        return {
            "weights": source,
            "inputs": {"data": self.data.fingerprint, "weights": origin.fingerprint, **mask},
        }


def load(config: ConfigT) -> Loaded[ConfigT]:
    """Load images, model and mask that the config names; files at hand are checked before anything is fetched."""
    torch.set_float32_matmul_precision("highest")  # as in a new process, whatever ran on CUDA in this one before
    device = choose_device(config.run.device)
    mask = check_files(config)
    weights = starting_weights(config)
    config = settle(config, weights, device)
    architecture = _architecture(config.model, weights)  # refuses sizes that do not fit before any image is read
    data = load_images(config, _stored_size(config.model, weights, architecture.image_size))
    config = count_given_clients(config, data)
    if weights is not None and weights.classes is not None and config.model.head == "weights":
        check_same_classes(weights.classes, data.classes, weights.source)
    model = _load_model(config, weights, architecture, data.classes).to(device)
    if mask is not None and isinstance(config, CentralizedConfig | FederatedConfig) and config.train.mask is not None:
        check_mask(config.train.mask, *mask, model, force=config.train.force_mask)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"head": choose_head(config, model, mask)})}
    )
    if config.model.head not in HEADS:
        set_head(model, *read_head(Path(config.model.head), model))
    graphs = device.type == "cuda" and config.run.compile != "off" and isinstance(model, VisionTransformer)
    features = FeatureStore(
        config.data.cache_gb * 1e9,
        config.run.output_dir,
        batch_size=config.data.eval_batch_size,
        precision=config.run.arithmetic,
        compile="graph" if graphs else "off",
    )
    return Loaded(freeze_fitted_head(config, mask), data.to(device), model, mask, features)


def check_files(config: Config) -> tuple[Mask, MaskFacts] | None:
    """Read the mask file, and check that the other local files are there.

    Raises InputError for one that is missing or broken, before weights or images are fetched.
    """
    if config.data.dataset == "csv" and not config.data.data_dir.is_file():
        raise InputError(f"--data_dir {config.data.data_dir}: no such file; give the CSV file of path and label")
    if config.data.dataset == "folder" and not config.data.data_dir.is_dir():
        raise InputError(f"--data_dir {config.data.data_dir}: no such folder; give the folder of class folders")
    if config.model.head not in ("auto", *HEADS) and not Path(config.model.head).is_file():
        raise InputError(f"--head {config.model.head}: no such file; give {', '.join(HEADS)} or a head file")
    if isinstance(config, CentralizedConfig | FederatedConfig) and config.train.mask is not None:
        return read_mask_file(config.train.mask)
    return None


def starting_weights(config: Config) -> Weights | None:
    """The weights that the config names; None: from scratch."""
    options, checkpoints = config.model, config.run.output_dir / "checkpoints"
    if isinstance(config, EditingConfig) and config.editing.checkpoint is not None:
        return checkpoint_weights(find_checkpoint(config.editing.checkpoint, checkpoints))
    source = options.weights
    if source == "auto":
        source = "none" if config.data.dataset == "digits" else "pretrained"
        if source == "none":
            note("weights", "digits are small: a small model from scratch; --weights gives it pretrained ones")
    if source == "none":
        return None
    if not Path(source).is_file():  # a run by its name, or by any of its folders, as --checkpoint takes them
        with suppress(InputError):
            source = str(find_checkpoint(Path(source), checkpoints))
    if source.endswith(".json"):
        return checkpoint_weights(find_checkpoint(Path(source), checkpoints))
    return load_weights(source, options.model_size or "small", normalisation=options.normalisation)


def _stored_size(options: ModelOptions, weights: Weights | None, image_size: int) -> int:
    """Pixels a side to store images at: what is cut away at the sides in the end comes on top."""
    if weights is None:
        return image_size
    _, crop = resizing_of(weights, options.resize)
    return View(image_size, weights.mean, weights.std, crop=crop).resized


def load_images(config: Config, image_size: int) -> Dataset:
    """Load the data set that the options name, at ``image_size`` pixels a side, with as many training images."""
    options = config.data
    data = load_dataset(
        options.dataset,
        options.data_dir,
        val_fraction=options.val_fraction,
        calibration_fraction=options.calibration_fraction,
        seed=options.split_seed,
        image_size=image_size,
        cache_dir=options.cache_dir,
        bar=bar,
    )
    if options.train_skip >= len(data.train):
        raise InputError(f"--train_skip {options.train_skip}: there are only {len(data.train)} training images")
    return replace(data, train=data.train.slice(options.train_skip, options.train_limit))


def _architecture(options: ModelOptions, weights: Weights | None) -> Architecture | LibraryArchitecture:
    """The model's sizes, as the options settle them; its number of classes is still open."""
    assert options.image_size is not None
    if weights is not None:
        return replace(weights.architecture, image_size=options.image_size)
    if options.head == "weights":
        raise InputError("--head weights: there are none; use random, ridge, ncm, linear or a head file")
    assert options.model_size is not None
    assert options.patch_size is not None
    return Architecture(options.model_size, options.image_size, options.patch_size, num_classes=0)


def _load_model(
    config: Config,
    weights: Weights | None,
    architecture: Architecture | LibraryArchitecture,
    classes: tuple[str, ...],
) -> Backbone:
    options, seed = config.model, config.run.seed
    if weights is None:
        model = build_model(replace(architecture, num_classes=len(classes)), seed)
    else:
        size, head, resize = architecture.image_size, options.head, options.resize
        model = model_with_weights(weights, classes, image_size=size, seed=seed, head=head, resize=resize)
    if (override := STATISTICS.get(options.normalisation)) is not None:
        model.mean, model.std = override
    return model
