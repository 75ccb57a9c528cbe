"""Ranking: which entries, or groups of entries, have the lowest scores; exact in number, with ties drawn.

Letters: E eligible entries, G groups of entries that stay or go together.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.backbone import Facts
from fedtalos.models.vision_transformer import parts
from fedtalos.randomness import generator
from fedtalos.training.entries import Entries

Granularity = Literal["entry", "row", "head", "tensor"]


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of every eligible entry, int64 (E,), and the groups' sizes (G,)."""

    of: Tensor
    sizes: Tensor


def group_entries(eligible: Entries, granularity: Granularity, architecture: Facts) -> Groups | None:
    """Group the eligible entries that stay or go together; None where each stands for itself.

    row: the weights into one output. head: the rows of one attention head in q, in k or in v; a whole tensor of
    other layers. tensor: a whole tensor, where q, k and v of a block count as three. An entry of a bias
    or of a norm is a row of its own.

    Raises InputError for granularity head where nobody knows the architecture's heads.

    >>> groups = group_entries(eligible_entries(model), "row", model.architecture)
    """
    if granularity == "entry":
        return None
    if granularity not in ("row", "head", "tensor"):
        raise InputError(f"granularity {granularity!r}: expected entry, row, head or tensor")
    heads = architecture.heads
    if granularity == "head" and not heads:
        raise InputError(f"granularity head: {architecture} says nothing of its heads; choose entry, row or tensor")
    ids, count = {}, 0
    for name, mask in eligible.masks.items():
        rows, tensors = len(mask), len(parts(name, mask))
        members = {"row": rows, "head": tensors * heads if tensors > 1 else 1, "tensor": tensors}[granularity]
        local = torch.arange(rows, device=mask.device) * members // rows + count
        ids[name] = local.view(-1, *[1] * (mask.dim() - 1)).expand(mask.shape)
        count += members
    of = eligible.gather(ids)
    return Groups(of, torch.bincount(of, minlength=count))


def entries_kept(density: float, entries: int) -> int:
    """Number of entries that stay at a density: round(density entries).

    Raises InputError for a density outside (0, 1], or one that leaves no entry.

    >>> entries_kept(0.1, 10_000)
    1000
    """
    if not 0 < density <= 1:
        raise InputError(f"density {density}: expected a share above 0 and at most 1, such as 0.1")
    if (count := round(density * entries)) == 0:
        raise InputError(
            f"density {density:g} (target_sparsity {1 - density:g}): leaves none of {entries} entries to move"
        )
    return count


def keep_lowest(scores: Tensor, kept: Tensor, count: int, seed: int, iteration: int) -> Tensor:
    """The ``count`` lowest-scored of the ``kept`` entries as bool (E,): one global ranking, ties by a named draw.

    ``scores`` (E,) float32, ``kept`` bool (E,) with at least ``count`` True. One copy of the candidates' scores is
    partitioned, on the CPU; nothing is sorted.

    >>> keep_lowest(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, True, True]), 2, seed=0, iteration=1)
    tensor([False,  True,  True])
    """
    values, candidates = scores.cpu().numpy(), kept.cpu().numpy()
    if count == 0:
        return torch.zeros_like(kept)
    ranked = values[candidates]
    ranked.partition(count - 1)
    threshold = ranked[count - 1]
    del ranked
    chosen = candidates & (values < threshold)
    ties = np.flatnonzero(candidates & (values == threshold))
    order = generator(seed, "ties", iteration).permutation(len(ties))
    chosen[ties[order[: count - np.count_nonzero(chosen)]]] = True
    return torch.from_numpy(chosen).to(kept.device)


def keep_lowest_groups(scores: Tensor, kept: Tensor, count: int, groups: Groups, seed: int, iteration: int) -> Tensor:
    """The lowest-scored of the ``kept`` groups, until the next would exceed ``count`` entries, at least one: bool (E,).

    A group's score is the mean of its entries' scores (E,): by the sum, small tensors would always win.

    >>> kept = keep_lowest_groups(scores, kept, len(scores) // 10, groups, seed=0, iteration=1)
    """
    sizes = groups.sizes.cpu().numpy()
    of = groups.of.cpu()
    sums = torch.bincount(of, weights=scores.cpu().double(), minlength=len(sizes)).numpy()
    alive = torch.bincount(of[kept.cpu()], minlength=len(sizes)).numpy() > 0
    score = np.where(alive, sums / np.maximum(sizes, 1), np.inf)
    order = np.lexsort((generator(seed, "ties", iteration).random(len(sizes)), score))
    fits = sizes[order].cumsum() <= count
    fits[0] = True
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[fits & alive[order]]] = True
    return chosen[of].to(kept.device)
