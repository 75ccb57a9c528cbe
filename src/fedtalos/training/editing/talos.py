"""TaLoS: let the entries move that the pretrained model is least sensitive to, and freeze all others.

Source: Iurada, Ciccone and Tommasi, ICLR 2025 (arXiv 2504.02620), section 4.2 and algorithm 1:

    kept <- all E eligible entries
    for r = 1..R:
        theta_r <- theta, entries no longer kept times soft_zero
        scores  <- diagonal Fisher information at theta_r, from zero, summed over the images
        kept    <- the round(density^(r/R) E) lowest-scored of the kept entries

Letters: E eligible entries, R iterations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedtalos.data.images import LabelledImages
from fedtalos.devices import Precision
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.eligible import Eligible, eligible_entries, mask_of
from fedtalos.training.editing.fisher import FisherMode
from fedtalos.training.editing.ranking import (
    Granularity,
    Groups,
    entries_kept,
    group_entries,
    keep_lowest,
    keep_lowest_groups,
)
from fedtalos.training.editing.sensitivity import Holder, Sensitivity, chunk_that_fits, draw_holders
from fedtalos.training.entries import Entries, Mask

Criterion = Literal["least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random"]

Score = Callable[[int, Tensor], Tensor]
"""(iteration 1..R, kept (E,)) -> fresh scores (E,), low = keep."""


def talos_mask(
    model: Backbone,
    images: LabelledImages | Sequence[Holder],
    *,
    density: float = 0.1,
    iterations: int = 4,
    criterion: Literal["talos", "least_sensitive", "most_sensitive"] = "least_sensitive",
    eligible: Eligible = "blocks",
    granularity: Granularity = "entry",
    soft_zero: float = 0.01,
    fisher: FisherMode = "true",
    fisher_samples: int = 1,
    max_images: int | None = None,
    chunk: int | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
) -> Mask:
    """A mask of the share ``density`` of eligible entries that the model is least sensitive to.

    ``images`` are one set, or several holders' (federated calibration: everyone's scores are added); about
    ``max_images`` of them are drawn (None: all). ``criterion`` talos is another name of least_sensitive; most_sensitive
    is its opposite, a control. ``eligible`` and ``granularity``: entries to choose from, and what stays or goes
    together. ``soft_zero`` multiplies entries no longer kept while the next iteration scores. ``fisher_samples`` labels
    are drawn for each image. ``chunk`` examples share a backward pass (None: as memory allows). ``precision`` fp32 is
    strict float32 (no TF32); bf16 is faster and gives another mask. The mask lies on the CPU; the command `editing`
    makes the same one of the same images and seed.

    Raises InputError for an untrained head, where there are no images, and for values outside their limits.

    >>> mask = talos_mask(model, data.calibration, density=0.1)
    """
    refuse_untrained_head(model)
    if criterion not in ("talos", "least_sensitive", "most_sensitive"):
        raise InputError(
            f"criterion {criterion!r}: expected least_sensitive, its other name talos, or most_sensitive; "
            "random_mask and magnitude_mask make masks without images"
        )
    entries = eligible_entries(model, eligible)
    holders = draw_holders(images, max_images, seed)
    score = Sensitivity(
        model,
        entries,
        holders,
        rule="most_sensitive" if criterion == "most_sensitive" else "least_sensitive",
        soft_zero=soft_zero,
        fisher=fisher,
        fisher_samples=fisher_samples,
        chunk=chunk_that_fits(model, holders[0].images) if chunk is None else chunk,
        precision=precision,
        seed=seed,
    )
    groups = group_entries(entries, granularity, model.architecture)
    *_, last = refine(score, entries, density=density, iterations=iterations, seed=seed, groups=groups)
    return mask_of(entries, last.kept)


def refuse_untrained_head(model: Backbone) -> None:
    """Raise InputError where the model's head is random: scores through it would mean nothing."""
    if model.head_source == "random":
        raise InputError(
            "head random: scores through an untrained head would mean nothing; fit one (ridge), give a head file, or "
            "take a model that was trained on these classes"
        )


@dataclass(frozen=True, eq=False)
class Iteration:
    """One refinement: its number (1..R), which eligible entries (E,) stay True, and their share."""

    number: int
    kept: Tensor
    density: float


def refine(
    score: Score,
    eligible: Entries,
    *,
    density: float,
    iterations: int,
    seed: int,
    start: tuple[int, Tensor] | None = None,
    groups: Groups | None = None,
) -> Iterator[Iteration]:
    """Yield R ever sparser masks; after iteration r exactly round(density^(r/R) E) eligible entries stay.

    ``score(r, kept)`` gives fresh scores (E,), low = keep, of the weights softened by ``kept`` (E,). ``start`` is a
    finished iteration to go on from. With ``groups``, whole groups stay, until the next would exceed that number. An
    entry once excluded stays excluded.

    Raises InputError for values outside their limits.

    >>> for iteration in refine(score, eligible, density=0.1, iterations=4, seed=0):
    ...     print(iteration.number, iteration.density)
    """
    if iterations < 1:
        raise InputError(f"iterations {iterations}: expected at least 1")
    entries_kept(density, len(eligible))
    done, kept = start or (0, torch.ones(len(eligible), dtype=torch.bool, device=eligible.device))
    for number in range(done + 1, iterations + 1):
        count = entries_kept(density ** (number / iterations), len(eligible))
        scores = score(number, kept)
        if groups is None:
            kept = keep_lowest(scores, kept, count, seed, number)
        else:
            kept = keep_lowest_groups(scores, kept, count, groups, seed, number)
        yield Iteration(number, kept, int(kept.sum()) / len(eligible))
