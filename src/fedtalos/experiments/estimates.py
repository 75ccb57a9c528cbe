"""How long runs would take: a step and an evaluation of each kind are timed on random images, and multiplied.

Nothing is downloaded or written. What a run does beside (reading images, figures: seconds) is not counted.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from fedtalos.config import LOOKS_AT_IMAGES, CentralizedConfig, DataOptions, EditingConfig, FederatedConfig, RunConfig
from fedtalos.data.batches import View, steps_per_epoch
from fedtalos.data.dataset_loader import Dataset, load_dataset
from fedtalos.data.images import LabelledImages
from fedtalos.devices import choose_device
from fedtalos.errors import InputError
from fedtalos.experiments.algorithms import local_steps
from fedtalos.experiments.grids import Cell
from fedtalos.experiments.moving import moving_entries, optimizer_for
from fedtalos.experiments.preparation import resolve, starting_weights
from fedtalos.experiments.scoring import Holder, chunk_that_fits, scorer
from fedtalos.experiments.setup import Setup
from fedtalos.masks import load_mask
from fedtalos.models.hub import FILES, hub_address
from fedtalos.models.pixels import HALF
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.parameters import Entries
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.editing import eligible_entries
from fedtalos.training.fedavg import clients_per_round

PUBLISHED = {"cifar100": (50_000, 10_000, 100), "cifar10": (50_000, 10_000, 10)}
"""Training images, test images and classes of the data sets that would have to be downloaded; 32 px a side."""


@dataclass(frozen=True)
class Amounts:
    """How many images a run has, how many of ``val`` and ``test`` it reads, and pixels a side as they are stored."""

    train: int
    calibration: int
    val: int
    test: int
    classes: int
    side: int


@dataclass(frozen=True)
class Speed:
    """Seconds of a step (of editing: of scoring an image once), and of an image without gradients.

    ``cached``: training reads what frozen blocks made of each image once.
    """

    step: float
    image: float
    cached: bool


class Estimator:
    """Seconds of runs; what was measured for one serves all that compute the same."""

    def __init__(self) -> None:
        self._speeds: dict[str, Speed] = {}

    def seconds(self, cell: Cell) -> float:
        """The whole run, from its start."""
        data = cell.config.data
        amounts = count_images(data, cell.config.model.image_size or 224)
        architecture = architecture_of(cell, amounts.classes)
        model = cell.config.model.model_copy(
            update={name: getattr(architecture, attribute) for name, attribute in _SIZES.items()}
        )
        device = choose_device(cell.config.run.device)
        config = resolve(cell.config.model_copy(update={"model": model}), None, device)
        kind = repr((architecture, amounts.side, data.eval_batch_size, _what_computes(cell, config)))
        if kind not in self._speeds:
            setup = stand_in(config, architecture, amounts, device)
            self._speeds[kind] = (
                scoring_speed(config, setup)
                if isinstance(config, EditingConfig)
                else training_speed(cell, config, setup)
            )
        if isinstance(config, EditingConfig):
            return editing_seconds(config, amounts, self._speeds[kind])
        return training_seconds(config, amounts, self._speeds[kind])


_SIZES = {"model_size": "size", "image_size": "image_size", "patch_size": "patch_size"}


def _what_computes(cell: Cell, config: RunConfig) -> object:
    """The options that a step's time depends on."""
    run = (config.run.device, config.run.precision, config.model.head == "weights")
    if isinstance(config, EditingConfig):
        return run, config.editing.criterion in LOOKS_AT_IMAGES, config.editing
    train, edit = config.train, edit_for(cell)
    mask = None if train.mask is None else train.mask if edit is None or train.mask.exists() else _drawn_for(edit)
    return run, mask, train.trainable, train.freeze_head, train.optimizer, train.batch_size, train.augmentation


def _drawn_for(edit: EditingConfig) -> tuple[str, float]:
    return edit.editing.eligible, edit.editing.target_sparsity


def edit_for(cell: Cell) -> EditingConfig | None:
    """The edit, of the same grid, that makes the mask of a run."""
    mask = None if isinstance(cell.config, EditingConfig) else cell.config.train.mask
    for need in cell.needs:
        if isinstance(need.config, EditingConfig) and str(need.paths.mask) == str(mask):
            return need.config
    return None


@cache
def count_images(data: DataOptions, image_size: int) -> Amounts:
    """As `load_dataset` shares them out, without the files of those that would have to be downloaded."""
    if data.dataset in PUBLISHED:
        count, test, classes = PUBLISHED[data.dataset]
        val = round(data.val_fraction * count)
        calibration = round(data.calibration_fraction * (count - val))
        train, side = count - val - calibration, 32
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
        classes, side = len(loaded.classes), loaded.train.pixels.shape[-1]
    train = min(max(1, train - data.train_skip), data.train_limit or train)
    limit = data.eval_limit or max(val, test)
    return Amounts(train, calibration, min(val, limit), min(test, limit), classes, side)


def architecture_of(cell: Cell, classes: int) -> Architecture:
    """As the options say, else as the weights have it, by their name where they would have to be downloaded."""
    options = cell.config.model
    start = [need for need in cell.needs if not isinstance(need.config, EditingConfig)]
    if start:
        like = architecture_of(start[0], classes)
        size, image_size, patch_size = like.size, like.image_size, like.patch_size
    elif options.weights == "none":
        size, image_size, patch_size = options.model_size or "small", 32, 4
    elif _on_the_hub(cell.config):
        name, _ = hub_address(options.weights, options.model_size or "small")
        found = re.search(r"vit_([a-z]+)_patch(\d+)(?:_.*?)?_(\d{2,})", name)
        size, image_size, patch_size = (found[1], int(found[3]), int(found[2])) if found else ("small", 224, 16)
    else:
        size, image_size, patch_size = _read(cell.config)
    return Architecture(
        options.model_size or size, options.image_size or image_size, options.patch_size or patch_size, classes
    )


def _on_the_hub(config: RunConfig) -> bool:
    if isinstance(config, EditingConfig) and config.editing.checkpoint is not None:
        return False
    name, checkpoints = config.model.weights, config.run.output_dir / "checkpoints"
    here = name.endswith((*FILES, ".json")) or (checkpoints / name / "last.json").exists()
    return not here and not name.startswith(("timm:", "torch:"))


@cache
def _read(config: RunConfig) -> tuple[str, int, int]:
    weights = starting_weights(config)
    assert weights is not None
    theirs = weights.architecture
    if not isinstance(theirs, Architecture):
        raise InputError(f"--dry_run: there is no estimate for {theirs}; leave it out")
    return theirs.size, theirs.image_size, theirs.patch_size


def stand_in(config: RunConfig, architecture: Architecture, amounts: Amounts, device: torch.device) -> Setup:
    """A setup of a model of that architecture and random images, a batch of each split."""
    batch = 1 if isinstance(config, EditingConfig) else config.train.batch_size
    count = max(config.data.eval_batch_size, batch)
    rng = torch_generator(0, "estimate")
    pixels = torch.randint(0, 256, (count, 3, amounts.side, amounts.side), dtype=torch.uint8, generator=rng)
    images = LabelledImages(pixels, torch.arange(count) % amounts.classes)
    names = tuple(str(number) for number in range(amounts.classes))
    return Setup(
        device=device,
        precision="bf16" if config.run.precision == "bf16" else "fp32",
        dataset=Dataset("random", names, images, images, images, images, "").to(device),
        model=VisionTransformer(architecture, rng).to(device),
        view=View(architecture.image_size, *HALF),
        weights="",
        weights_origin={},
        head="weights" if config.model.head == "weights" else "random",
        mask=None,
        eval_batch_size=config.data.eval_batch_size,
        eval_limit=config.data.eval_batch_size,
        cache_bytes=config.data.cache_gb * 1e9,
        cache_folder=config.run.output_dir,
    )


def training_speed(cell: Cell, config: CentralizedConfig | FederatedConfig, setup: Setup) -> Speed:
    """Two steps as the run takes them, at learning rate 0, and one batch of evaluation."""
    train = config.train
    if train.mask is None:
        entries = moving_entries(setup, train)
    else:
        mask: dict[str, torch.Tensor] = {}
        edit = edit_for(cell)
        if edit is None or train.mask.exists():
            mask |= load_mask(train.mask)[0]
        else:  # a mask as dense, drawn; a real one often leaves whole tensors still, and costs less
            eligible = eligible_entries(setup.model, edit.editing.eligible)
            kept = torch.rand(len(eligible), generator=torch_generator(0, "estimate")) >= edit.editing.target_sparsity
            mask |= eligible.unflatten(kept.to(setup.device))
        head = {} if train.freeze_head else dict(setup.model.head.named_parameters(prefix="head"))
        mask |= {name: torch.ones_like(tensor, dtype=torch.bool, requires_grad=False) for name, tensor in head.items()}
        entries = Entries({name: tensor.to(setup.device) for name, tensor in mask.items()})
    optimizer = optimizer_for(setup, entries, train)

    def steps() -> None:
        optimizer.state.clear()
        setup.train_on(
            np.arange(train.batch_size),
            2,
            optimizer,
            entries,
            train,
            rng=generator(0, "estimate"),
            learning_rate=lambda _: 0.0,
            where="the estimate",
            watch=lambda batches: batches,
        )

    cached = setup.frozen_stages > 0 and train.augmentation == "none"
    return Speed(seconds_of(steps) / 2, evaluation_speed(setup), cached)


def scoring_speed(config: EditingConfig, setup: Setup) -> Speed:
    """One chunk of images scored once, where the rule looks at images, and one batch of evaluation."""
    if config.editing.criterion not in LOOKS_AT_IMAGES:
        return Speed(0.0, evaluation_speed(setup), cached=False)
    chunk = config.editing.fisher_chunk or chunk_that_fits(setup)
    editing = config.editing.model_copy(update={"fisher_chunk": chunk, "calibration": "central"})
    eligible = eligible_entries(setup.model, editing.eligible)
    score = scorer(setup, eligible, None, config.model_copy(update={"editing": editing}), lambda batches, _: batches)
    ids = np.arange(min(chunk, len(setup.dataset.train)))
    holder = Holder(0, ids, setup.dataset.train.subset(ids))
    kept = torch.ones(len(eligible), dtype=torch.bool)
    return Speed(seconds_of(lambda: score([holder], 1, kept)) / len(ids), evaluation_speed(setup), cached=False)


def evaluation_speed(setup: Setup) -> float:
    """Seconds of an image of one batch of evaluation."""
    return seconds_of(lambda: setup.evaluate("test")) / setup.eval_batch_size


def seconds_of(work: Callable[[], object]) -> float:
    """The faster of two times, after a first that sets up what is made once."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


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
    images += int(seen) if speed.cached else 0
    images += amounts.train if config.model.head == "ridge" else 0
    return steps * speed.step + images * speed.image


def editing_seconds(config: EditingConfig, amounts: Amounts, speed: Speed) -> float:
    """Iterations of scoring, and a ridge head."""
    central = config.editing.calibration == "central"
    held = amounts.calibration if central else amounts.train
    scored = min(config.editing.calibration_images, held) * config.editing.num_iterations
    fits = config.model.head in ("auto", "ridge")
    return scored * speed.step + (held + amounts.val if fits else 0) * speed.image
