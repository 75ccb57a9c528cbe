"""Seconds of a training step, of scoring an image and of looking at one, timed on random images of the right size."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtalos.app.config.schema import (
    LOOKS_AT_IMAGES,
    CentralizedConfig,
    EditingConfig,
    EditingOptions,
    FederatedConfig,
    RunConfig,
)
from fedtalos.app.moving import moving_entries, optimizer_for
from fedtalos.app.scoring import Holder, chunk_that_fits, scorer
from fedtalos.app.setup import Setup
from fedtalos.data.batches import View
from fedtalos.data.dataset_loader import Dataset
from fedtalos.data.images import LabelledImages
from fedtalos.devices import choose_device
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.pixels import HALF
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.editing.mask_file import load_mask
from fedtalos.training.editing.talos import eligible_entries
from fedtalos.training.masked_parameters import Entries


@dataclass(frozen=True)
class Speed:
    """Seconds of a step (of editing: of scoring an image once), and of an image without gradients.

    ``cached``: steps read what frozen blocks made of each image once.
    """

    step: float
    image: float
    cached: bool


def measure(config: RunConfig, edit: EditingOptions | None, architecture: Architecture, stored_size: int) -> Speed:
    """Of a run of resolved options, on images that are stored with ``stored_size`` pixels a side.

    ``edit`` is to make the run's mask, where there is none yet.
    """
    setup = stand_in(config, architecture, stored_size)
    if isinstance(config, EditingConfig):
        return Speed(scoring_seconds(config, setup), evaluation_seconds(setup), cached=False)
    seconds = step_seconds(config, edit, setup)  # first: it says what is frozen
    cached = setup.frozen_stages > 0 and config.train.augmentation == "none"
    return Speed(seconds, evaluation_seconds(setup), cached)


def stand_in(config: RunConfig, architecture: Architecture, stored_size: int) -> Setup:
    """A setup of a model of that architecture, its weights drawn, and random images: a batch, in every split."""
    device, classes = choose_device(config.run.device), architecture.num_classes
    count = max(config.data.eval_batch_size, 1 if isinstance(config, EditingConfig) else config.train.batch_size)
    rng = torch_generator(0, "estimate")
    pixels = torch.randint(0, 256, (count, 3, stored_size, stored_size), dtype=torch.uint8, generator=rng)
    images = LabelledImages(pixels, torch.arange(count) % classes)
    return Setup(
        device=device,
        precision="bf16" if config.run.precision == "bf16" else "fp32",
        dataset=Dataset("random", ("",) * classes, images, images, images, images, "").to(device),
        model=VisionTransformer(architecture, rng).to(device),
        view=View(architecture.image_size, *HALF),
        weights="",
        weights_origin={},
        head="weights" if config.model.head == "weights" else "random",
        mask=None,
        eval_batch_size=config.data.eval_batch_size,
        eval_limit=config.data.eval_batch_size,
        cache_bytes=math.inf,  # beyond it, a file would be written
        cache_folder=config.run.output_dir,
    )


def step_seconds(config: CentralizedConfig | FederatedConfig, edit: EditingOptions | None, setup: Setup) -> float:
    """Of two steps, taken as the run takes them, but at learning rate 0."""
    train = config.train
    if train.mask is None:
        entries = moving_entries(setup, train)
    else:
        mask = drawn_mask(setup, edit) if edit is not None else load_mask(train.mask)[0]
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

    return seconds_of(steps) / 2


def drawn_mask(setup: Setup, edit: EditingOptions) -> dict[str, Tensor]:
    """As dense a mask as the edit will make. Drawn entries are everywhere; a real mask often costs less."""
    eligible = eligible_entries(setup.model, edit.eligible)
    kept = torch.rand(len(eligible), generator=torch_generator(0, "estimate")) >= edit.target_sparsity
    return eligible.unflatten(kept.to(setup.device))


def scoring_seconds(config: EditingConfig, setup: Setup) -> float:
    """Of an image, by scoring a few chunks; none where the rule does not look at images."""
    if config.editing.criterion not in LOOKS_AT_IMAGES:
        return 0.0
    chunk = config.editing.fisher_chunk or chunk_that_fits(setup)
    editing = config.editing.model_copy(update={"fisher_chunk": chunk})
    eligible = eligible_entries(setup.model, editing.eligible)
    score = scorer(setup, eligible, None, config.model_copy(update={"editing": editing}), lambda batches, _: batches)
    ids = np.arange(min(4 * chunk, len(setup.dataset.train)))
    holder = Holder(0, ids, setup.dataset.train.subset(ids))
    kept = torch.ones(len(eligible), dtype=torch.bool)
    return seconds_of(lambda: score([holder], 1, kept)) / len(ids)


def evaluation_seconds(setup: Setup) -> float:
    """Of an image, by one batch; the test split is never cached."""
    return seconds_of(lambda: setup.evaluate("test")) / setup.eval_batch_size


def seconds_of(work: Callable[[], object]) -> float:
    """The faster of two times, after a first that sets up what is made once."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
