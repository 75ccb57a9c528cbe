"""Who scores which images for a mask, and the scores: central and federated differ only in who holds the images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.app.config.schema import EditingConfig, EditingOptions
from fedtalos.app.setup import Setup
from fedtalos.data.batches import evaluation_batches, steps_per_epoch
from fedtalos.data.images import LabelledImages
from fedtalos.devices import total_memory
from fedtalos.randomness import generator
from fedtalos.training.editing.fisher import Scored, activation_bytes, fisher_scores
from fedtalos.training.editing.talos import Groups, score_by_weights, soften
from fedtalos.training.federated.clients import Clients
from fedtalos.training.masked_parameters import Entries

BATCH = 64  # images whose summed gradient `--fisher batch` squares
MOST = {"cpu": 16}  # examples per chunk: beyond it a CPU's caches are too small (benchmarks/fisher.py)
MOST_ELSEWHERE = 256


@dataclass(frozen=True)
class Holder:
    """Someone who scores images: a client's number, or 0, and the images, whose ids name their random draws."""

    number: int
    ids: NDArray[np.int64]
    images: LabelledImages


Score = Callable[[Sequence[Holder], int, Tensor], Tensor]
"""(holders, iteration, kept (E,)) -> scores (E,), low = keep."""


def image_holders(setup: Setup, config: EditingConfig, clients: Clients | None) -> list[Holder]:
    """Clients, each with a draw of its training images, or, where there are none, one with the calibration split.

    Together they score about ``calibration_images``: each client its share of them, at least one.
    """
    wanted, count, seed = config.editing.calibration_images, config.editing.calibration_clients, config.run.seed
    if clients is None:
        ids = generator(seed, "scored").permutation(len(setup.dataset.calibration))[:wanted]
        return [Holder(0, ids, setup.dataset.calibration.subset(ids))]
    numbers = np.sort(generator(seed, "scorers").permutation(len(clients))[:count]).tolist()
    share = min(1.0, wanted / clients.sizes[numbers].sum())
    holders = []
    for number in numbers:
        held = clients[number]
        ids = generator(seed, "scored", number).choice(held, max(1, round(share * len(held))), replace=False)
        holders.append(Holder(number, ids, setup.dataset.train.subset(ids)))
    return holders


def chunk_that_fits(setup: Setup) -> int:
    """Examples per backward pass whose activations and largest weight gradient take an eighth of the memory at most.

    Of all memory, not of what is free now: the same machine is to add in the same order every time.
    """
    one = setup.view(setup.dataset.train.pixels[:1])
    largest = max(parameter.nbytes for parameter in setup.model.parameters())
    fits = total_memory(setup.device) // 8 // (activation_bytes(setup.model, one) + largest)
    return max(1, min(fits, MOST.get(setup.device.type, MOST_ELSEWHERE)))


def scorer(
    setup: Setup,
    eligible: Entries,
    groups: Groups | None,
    config: EditingConfig,
    watch: Callable[[Iterator[Scored], float], Iterator[Scored]],
) -> Score:
    """The scores of the rule that the config names; ``watch`` sees each batch pass and its share of the iteration."""
    options, seed, model = config.editing, config.run.seed, setup.model
    size = BATCH if options.fisher == "batch" else setup.eval_batch_size

    def fisher(holders: Sequence[Holder], number: int, kept: Tensor) -> Tensor:
        weights = soften(model, eligible, kept, options.soft_zero)
        total = torch.zeros(len(eligible), device=eligible.device)
        steps = sum(steps_per_epoch(len(holder.ids), size) for holder in holders)
        for holder in holders:
            scores = fisher_scores(
                model,
                watch(scored_batches(holder, number), 1 / steps),
                eligible.masks,
                weights,
                mode=options.fisher,
                chunk=options.fisher_chunk or 1,
                precision=setup.precision,
            )
            total += eligible.gather(scores)
        return total

    def scored_batches(holder: Holder, number: int) -> Iterator[Scored]:
        draws = [generator(seed, "labels", number, int(id_)).random(options.fisher_samples) for id_ in holder.ids]
        uniforms = torch.from_numpy(np.stack(draws)).split(size)
        for (images, labels), u in zip(evaluation_batches(holder.images, setup.view, size), uniforms, strict=True):
            yield images, labels, u

    match options.criterion:
        case "least_sensitive":
            return fisher
        case "most_sensitive":
            return lambda holders, number, kept: -fisher(holders, number, kept)
        case rule:
            scores = score_by_weights(rule, model, eligible, seed, groups)
            return lambda *_: scores


def fisher_name(options: EditingOptions) -> str:
    """How a mask file names the scores."""
    return f"batch of at most {BATCH}" if options.fisher == "batch" else options.fisher
