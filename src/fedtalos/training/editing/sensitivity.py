"""Sensitivity: Fisher scores of a softly masked copy of the model, summed over the images of everyone who scores.

Central and federated calibration differ only in who holds the images: scores of holders add up to those of all images
in one place. Letters: E eligible entries.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedtalos.data.batches import steps_per_epoch
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.devices import Precision, total_memory
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.randomness import generator
from fedtalos.training.editing.fisher import FisherMode, Scored, activation_bytes, scored_batches, scores_of_each
from fedtalos.training.engine.capture import Compile
from fedtalos.training.entries import Entries, named_tensors
from fedtalos.training.feature_cache import view_of

SensitivityRule = Literal["least_sensitive", "most_sensitive"]

Watch = Callable[[Iterable[Scored], float], Iterable[Scored]]
"""Passes batches on; each is that share of an iteration."""

BATCH = 64
"""Images whose summed gradient fisher "batch" squares."""
MOST = {"cpu": 16}
"""Examples per chunk by device: beyond it a CPU's caches are too small (benchmarks/fisher.py)."""
MOST_ELSEWHERE = 256


@dataclass(frozen=True, eq=False)
class Holder:
    """Someone who scores images: a client's number, or 0, and the images at ``ids``, which name their random draws.

    >>> holders = [Holder(k, clients[k], clients.images) for k in range(len(clients))]
    """

    number: int
    ids: Ids
    images: LabelledImages


def draw_holders(images: LabelledImages | Sequence[Holder], max_images: int | None, seed: int) -> list[Holder]:
    """Draw who scores which images: about ``max_images`` together (None: all), each holder its share, at least one.

    Raises InputError where a holder has no images, or there is none.

    >>> holders = draw_holders(data.calibration, 640, seed=0)
    """
    if max_images is not None and max_images < 1:
        raise InputError(f"max_images {max_images}: expected at least 1")
    held = [len(images)] if isinstance(images, LabelledImages) else [len(holder.ids) for holder in images]
    if not held or 0 in held:
        raise InputError("images: expected at least one image of everyone who scores, got none; give more images")
    if isinstance(images, LabelledImages):
        ids = generator(seed, "scored").permutation(len(images))[:max_images]
        return [Holder(0, ids, images)]
    share = 1.0 if max_images is None else min(1.0, max_images / sum(held))
    drawn = []
    for holder, count in zip(images, held, strict=True):
        rng = generator(seed, "scored", holder.number)
        ids = rng.choice(holder.ids, max(1, round(share * count)), replace=False)
        drawn.append(replace(holder, ids=ids))
    return drawn


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Scores of entries on holders' images: Fisher information of the softly masked copy, summed over all images.

    The call ``sensitivity(r, kept)`` gives them, (E,), low = keep; rule most_sensitive turns their sign. ``fisher``
    says which labels are scored, ``chunk`` how many examples share a backward pass, ``batch_size`` how many are made
    ready at a time. ``watch`` sees each batch pass and its share of the iteration.

    Raises InputError for values outside their limits, TrainingError where a score is not finite.

    >>> score = Sensitivity(model, eligible_entries(model), draw_holders(data.calibration, 640, seed=0))
    >>> masks = list(refine(score, score.eligible, density=0.1, iterations=4, seed=0))
    """

    model: Backbone
    eligible: Entries
    holders: Sequence[Holder]
    rule: SensitivityRule = "least_sensitive"
    soft_zero: float = 0.01
    fisher: FisherMode = "true"
    fisher_samples: int = 1
    chunk: int = 16
    batch_size: int = 250
    precision: Precision = "fp32"
    compile: Compile = "off"
    seed: int = 0
    watch: Watch = lambda batches, _share: batches

    def __post_init__(self) -> None:
        if not 0 < self.soft_zero <= 1:
            raise InputError(f"soft_zero {self.soft_zero}: expected a factor above 0 and at most 1, such as 0.01")
        for name in ("fisher_samples", "chunk", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")

    def __call__(self, number: int, kept: Tensor) -> Tensor:
        """Scores (E,) of iteration ``number``, low = keep, where the entries ``kept`` (E,) are still in."""
        weights = soften(self.model, self.eligible, kept, self.soft_zero)
        size = BATCH if self.fisher == "batch" else self.batch_size
        share = 1 / sum(steps_per_epoch(len(holder.ids), size) for holder in self.holders)

        def batches_of(holder: Holder) -> Iterable[Scored]:
            batches = scored_batches(
                self.model,
                holder.images,
                holder.ids,
                samples=self.fisher_samples,
                seed=self.seed,
                number=number,
                batch_size=size,
            )
            return self.watch(batches, share)

        sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        for scores in scores_of_each(
            self.model,
            map(batches_of, self.holders),
            self.eligible.masks,
            weights,
            mode=self.fisher,
            chunk=self.chunk,
            precision=self.precision,
            compile=self.compile,
        ):
            torch._foreach_add_(list(sums.values()), list(scores.values()))
        total = self.eligible.gather(sums)
        return -total if self.rule == "most_sensitive" else total


def soften(model: nn.Module, eligible: Entries, kept: Tensor, soft_zero: float) -> dict[str, Tensor]:
    """A copy of the eligible tensors in which entries no longer kept (E,) are multiplied by ``soft_zero``.

    >>> weights = soften(model, eligible, kept, soft_zero=0.01)
    """
    weights = {name: named_tensors(model)[name].clone() for name in eligible.masks}
    values = eligible.gather(weights)
    eligible.scatter(torch.where(kept, values, values * soft_zero), weights)
    return weights


def chunk_that_fits(model: Backbone, images: LabelledImages) -> int:
    """Examples per backward pass whose activations and largest weight gradient take an eighth of the memory at most.

    Of all memory, not of what is free now: the same machine must add in the same order every time.

    >>> chunk_that_fits(model, data.calibration)
    16
    """
    one = view_of(model)(images.pixels[:1])
    largest = max(parameter.nbytes for parameter in model.parameters())
    fits = total_memory(one.device) // 8 // (activation_bytes(model, one) + largest)
    return max(1, min(fits, MOST.get(one.device.type, MOST_ELSEWHERE)))
