"""How long runs would take: a step and an evaluation of each kind are timed on random images, and multiplied.

Nothing is downloaded, and nothing written but what a data set of folders is decoded to, which its first run would keep
too. What a run does beside (reading images, figures: seconds) is not counted.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fedtalos.app.algorithms import local_steps
from fedtalos.app.config.schema import (
    LOOKS_AT_IMAGES,
    CentralizedConfig,
    DataOptions,
    EditingConfig,
    EditingOptions,
    FederatedConfig,
    ModelOptions,
    RunConfig,
    RunOptions,
)
from fedtalos.app.load import resolve, starting_weights
from fedtalos.app.sweep.grid import Cell
from fedtalos.app.sweep.speeds import Speed, measure
from fedtalos.data.batches import steps_per_epoch
from fedtalos.data.dataset_loader import load_dataset
from fedtalos.devices import choose_device
from fedtalos.models.vision_transformer import Architecture, ModelSize
from fedtalos.models.weights.hub import FILES, hub_address
from fedtalos.training.federated.fedavg import clients_per_round

PUBLISHED = {"cifar100": (50_000, 10_000, 100), "cifar10": (50_000, 10_000, 10)}
"""Training images, test images and classes of the data sets that would have to be downloaded; 32 px a side."""

Sizes = tuple[str, int, int]
"""Model size, image size and patch size."""

FITTED = ("ridge", "ncm", "linear")
"""Heads that take every image's features, once; beside that they cost next to nothing."""


@dataclass(frozen=True)
class Amounts:
    """Images that a run trains, calibrates, validates and tests on, their classes, and pixels a side as stored."""

    train: int
    calibration: int
    val: int
    test: int
    classes: int
    stored_size: int


class Estimator:
    """Seconds of runs; what was measured for one serves all whose steps compute the same."""

    def __init__(self) -> None:
        self._speeds: dict[object, Speed] = {}

    def seconds(self, cell: Cell) -> float | None:
        """The whole run, from its start; None where nothing here says what model it is to be."""
        headless = architecture_of(cell)
        if headless is None:
            return None
        amounts = count_images(cell.config.data, headless.image_size)
        architecture = replace(headless, num_classes=amounts.classes)
        sizes = {name: getattr(architecture, name.replace("model_", "")) for name in _SIZES}
        model = cell.config.model.model_copy(update=sizes)
        config = resolve(cell.config.model_copy(update={"model": model}), None, choose_device(cell.config.run.device))
        edit = edit_to_come(cell)
        kind = (architecture, amounts.stored_size, config.data.eval_batch_size, *what_computes(config, edit))
        if kind not in self._speeds:
            self._speeds[kind] = measure(config, edit, architecture, amounts.stored_size)
        if isinstance(config, EditingConfig):
            return editing_seconds(config, amounts, self._speeds[kind])
        return training_seconds(config, amounts, self._speeds[kind])


_SIZES = ("model_size", "image_size", "patch_size")


def what_computes(config: RunConfig, edit: EditingOptions | None) -> tuple[object, ...]:
    """The options that the time of a step depends on."""
    run = (config.run.device, config.run.precision, config.model.head == "weights")
    if isinstance(config, EditingConfig):
        options = config.editing
        looks = options.criterion in LOOKS_AT_IMAGES
        return *run, looks, options.eligible, options.fisher, options.fisher_samples, options.fisher_chunk
    train = config.train
    mask = train.mask if edit is None else (edit.eligible, edit.target_sparsity)
    return *run, mask, train.trainable, train.freeze_head, train.optimizer, train.batch_size, train.augmentation


def edit_to_come(cell: Cell) -> EditingOptions | None:
    """The edit of the same grid that is to make the run's mask; None where there is one already, or none is used."""
    if isinstance(cell.config, EditingConfig) or cell.config.train.mask is None or cell.config.train.mask.exists():
        return None
    edits = (need for need in cell.needs if need.paths.mask == cell.config.train.mask)
    return next((need.config.editing for need in edits if isinstance(need.config, EditingConfig)), None)


@cache
def count_images(data: DataOptions, image_size: int) -> Amounts:
    """As `load_dataset` shares them out, without the files of those that would have to be downloaded."""
    if data.dataset in PUBLISHED:
        count, test, classes = PUBLISHED[data.dataset]
        val = round(data.val_fraction * count)
        calibration = round(data.calibration_fraction * (count - val))
        train, stored_size = count - val - calibration, 32
    else:
        loaded = load_dataset(
            data.dataset,
            data.data_dir,
            val_fraction=data.val_fraction,
            calibration_fraction=data.calibration_fraction,
            seed=data.split_seed,
            image_size=image_size,
        )
        splits = (loaded.train, loaded.calibration, loaded.val, loaded.test)
        train, calibration, val, test = (len(split) for split in splits)
        classes, stored_size = len(loaded.classes), loaded.train.pixels.shape[-1]
    train = min(max(1, train - data.train_skip), data.train_limit or train)
    limit = data.eval_limit or max(val, test)
    return Amounts(train, calibration, min(val, limit), min(test, limit), classes, stored_size)


def architecture_of(cell: Cell) -> Architecture | None:
    """As the options say, else as the weights have it, by their name where they would have to be downloaded; no head.

    None where the model is another library's, or the name does not say.
    """
    options = cell.config.model
    start = [need for need in cell.needs if not isinstance(need.config, EditingConfig)]
    if start:
        like = architecture_of(start[0])
        sizes = None if like is None else (like.size, like.image_size, like.patch_size)
    elif options.weights == "none":
        sizes = options.model_size or "small", 32, 4
    else:
        source = options.weights
        if isinstance(cell.config, EditingConfig) and cell.config.editing.checkpoint is not None:
            source = str(cell.config.editing.checkpoint)
        sizes = _sizes_of(source, options.model_size or "small", cell.config.run.output_dir)
    if sizes is None:
        return None
    size, image_size, patch_size = sizes
    return Architecture(
        options.model_size or size, options.image_size or image_size, options.patch_size or patch_size, num_classes=0
    )


@cache
def _sizes_of(source: str, size: ModelSize, root: Path) -> Sizes | None:
    """Of a file, as it has them, on the hub, as the name says."""
    if source.endswith((*FILES, ".json")) or (root / "checkpoints" / source / "last.json").exists():
        config = CentralizedConfig(run=RunOptions(output_dir=root), model=ModelOptions(weights=source))
        weights = starting_weights(config)
        assert weights is not None
        theirs = weights.architecture
        if isinstance(theirs, Architecture):
            return theirs.size, theirs.image_size, theirs.patch_size
        return None
    return None if source.startswith(("timm:", "torch:")) else sizes_in_name(hub_address(source, size)[0])


def sizes_in_name(name: str) -> Sizes | None:
    """What the name of a plain ViT's weights says; None where it is not called as timm, Google or Meta call theirs."""
    dinov2 = "dinov2" in name
    if found := re.search(r"(?:vit|deit3?)[_-](tiny|small|base|large)[_-]patch(\d+)", name):
        pixels = re.search(r"[_-](\d{3})(?!\d)", name[found.end() :])
        return found[1], int(pixels[1]) if pixels else 518 if dinov2 else 224, int(found[2])
    if dinov2 and (found := re.search(r"-(small|base|large)$", name)):
        return found[1], 518, 14
    return None


def training_seconds(config: CentralizedConfig | FederatedConfig, amounts: Amounts, speed: Speed) -> float:
    """Steps, validations, two readings of the test split, and features that are computed once."""
    if isinstance(config, CentralizedConfig):
        total, seen = config.num_epochs, float(amounts.train)
        steps = total * steps_per_epoch(amounts.train, config.train.batch_size)
    else:
        federation, clients = config.federation, config.split.num_clients
        total = federation.num_rounds
        sampled = clients_per_round(clients, federation.client_fraction)
        steps = total * sampled * local_steps(federation, amounts.train // clients, config.train.batch_size)
        seen = amounts.train * (1 - (1 - sampled / clients) ** total)
    assert config.train.eval_every is not None
    validations = 1 if speed.cached else 1 + -(-total // config.train.eval_every)
    images = validations * amounts.val + 2 * amounts.test
    if config.model.head in FITTED:
        images += amounts.train
    elif speed.cached:
        images += round(seen)
    return steps * speed.step + images * speed.image


def editing_seconds(config: EditingConfig, amounts: Amounts, speed: Speed) -> float:
    """Iterations of scoring, and a ridge head."""
    central = config.editing.calibration == "central"
    held = amounts.calibration if central else amounts.train
    scored = min(config.editing.calibration_images, held) * config.editing.num_iterations
    fits = config.model.head in ("auto", *FITTED)
    return scored * speed.step + (held + amounts.val if fits else 0) * speed.image
