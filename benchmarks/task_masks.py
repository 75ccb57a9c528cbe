"""Masks of tasks that are to be merged: one for all, or one each, among them rules that are only tried here.

Letters: T tasks, E eligible entries.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

import fedtalos as ft
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.models.backbone import Backbone
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.eligible import eligible_entries, mask_of
from fedtalos.training.editing.ranking import entries_kept, keep_lowest
from fedtalos.training.entries import Entries, Mask

Rule = Literal["dense", "random", "talos", "most_sensitive", "disjoint", "others_over_own", "both"]
"""dense: all in the blocks. random, talos, most_sensitive: one mask for all tasks, of the density.

disjoint: random masks of which no two share an entry. others_over_own: each task's entries of least Fisher information
of the other tasks over its own. both: these, and no two share an entry.
"""


def masks_of(
    rule: Rule, model: Backbone, calibration: LabelledImages, own: Sequence[tuple[LabelledImages, Ids]], **how: float
) -> list[Mask]:
    """A mask for each task; ``own`` are images of each, to take its scores of, ``how``: density, seed, images.

    Raises ValueError where disjoint masks of the density do not fit.
    """
    density, seed, images, tasks = how["density"], int(how["seed"]), int(how["images"]), len(own)
    entries = eligible_entries(model)
    match rule:
        case "dense":
            return [{name: mask.cpu() for name, mask in entries.masks.items()}] * tasks
        case "random":
            return [ft.random_mask(model, density, seed=seed)] * tasks
        case "talos" | "most_sensitive":
            criterion: Literal["talos", "most_sensitive"] = rule
            made = ft.talos_mask(model, calibration, density=density, criterion=criterion, max_images=images, seed=seed)
            return [made] * tasks
    count = entries_kept(density, len(entries))
    if rule != "others_over_own" and tasks * count > len(entries):
        raise ValueError(f"{tasks} disjoint masks of density {density:g} do not fit; take at most {1 / tasks:g}")
    if rule == "disjoint":
        order = torch.randperm(len(entries), generator=torch_generator(seed, "disjoint masks"))
        return [_mask(entries, order[task * count : (task + 1) * count]) for task in range(tasks)]
    ratio = _others_over_own(model, entries, own, seed)
    if rule == "others_over_own":
        every = torch.ones(len(entries), dtype=torch.bool)
        return [mask_of(entries, keep_lowest(row, every, count, seed, 1).to(entries.device)) for row in ratio]
    return [_mask(entries, chosen) for chosen in disjoint_lowest(ratio, count)]


def disjoint_lowest(scores: Tensor, count: int) -> list[Tensor]:
    """Give each of T tasks ``count`` of E entries, of low scores (T, E), none to two: each first to its lowest scorer.

    A task to which too few fall takes the lowest-scored that are left.
    """
    first = scores.argmin(0)
    free = torch.ones(scores.shape[1], dtype=torch.bool)
    found = []
    for task, row in enumerate(scores):
        mine = (first == task).nonzero().squeeze(1)
        found.append(mine[row[mine].argsort(stable=True)[:count]])
        free[found[-1]] = False
    for task, row in enumerate(scores):
        lacking = count - len(found[task])
        if lacking > 0:
            left = free.nonzero().squeeze(1)
            more = left[row[left].argsort(stable=True)[:lacking]]
            free[more] = False
            found[task] = torch.cat([found[task], more])
    return found


def task_scores(
    models: Callable[[int], Backbone], own: Sequence[tuple[LabelledImages, Ids]], masks: Mask, seed: int
) -> list[dict[str, Tensor]]:
    """Fisher scores of each task's model on its images, by parameter name."""
    return [
        {
            name: score.cpu()
            for name, score in ft.fisher_scores(
                models(task), ft.scored_batches(models(task), images, ids, seed=seed), masks
            ).items()
        }
        for task, (images, ids) in enumerate(own)
    ]


def _others_over_own(model: Backbone, entries: Entries, own: Sequence[tuple[LabelledImages, Ids]], seed: int) -> Tensor:
    """Fisher information of the other tasks over that of each, (T, E); damped, so that dead entries are not first."""
    masks = {name: mask.cpu() for name, mask in entries.masks.items()}
    at = Entries(masks)
    found = torch.stack([at.gather(scores) for scores in task_scores(lambda _: model, own, entries.masks, seed)])
    found = found / found.mean(1, keepdim=True)  # tasks of unlike size weigh alike
    others = found.sum(0) - found
    return (others + 1e-3) / (found + 1e-3)


def _mask(entries: Entries, chosen: Tensor) -> Mask:
    kept = torch.zeros(len(entries), dtype=torch.bool)
    kept[chosen] = True
    return mask_of(entries, kept.to(entries.device))
