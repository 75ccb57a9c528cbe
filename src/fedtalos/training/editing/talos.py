"""TaLoS: scores -> mask, refined in rounds (Iurada, Ciccone and Tommasi, ICLR 2025, section 4.2 and algorithm 1).

The mask keeps the entries with the lowest scores: what the pretrained task is least sensitive to may move, all else
is frozen. Letters: E eligible entries, R iterations, G groups of entries that stay or go together.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedtalos.errors import InputError
from fedtalos.models.library_model import ForeignModel
from fedtalos.models.vision_transformer import parts
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.masked_parameters import Entries, named_tensors

Criterion = Literal["least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random"]
Eligible = Literal["blocks", "attention", "qk", "biases"]
Granularity = Literal["entry", "row", "head", "tensor"]


@dataclass(frozen=True)
class Iteration:
    """One refinement: its number (1..R), which eligible entries (E,) stay True, and their share."""

    number: int
    kept: Tensor
    density: float


@dataclass(frozen=True)
class Groups:
    """The group of every eligible entry, int64 (E,), and the groups' sizes (G,)."""

    of: Tensor
    sizes: Tensor


def eligible_entries(model: nn.Module, which: Eligible = "blocks") -> Entries:
    """Weights and biases of the layers inside the blocks, or only some, but for the key third of each qkv bias.

    That third has exactly zero gradient: it shifts all logits of a softmax row alike. ``which``: blocks (all),
    attention (qkv and proj), qk (their rows of qkv), biases (those of the norms too). Of a foreign model: of the layers
    that it calls scorable, and blocks or biases only. Layer scale is no layer's weight, and not eligible.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if isinstance(model, ForeignModel):
        shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] in model.scorable}
        if which not in ("blocks", "biases") or not shapes:
            raise InputError(
                f"--eligible {which}: masks of {model.architecture} choose from blocks or biases, of its "
                f"{len(model.scorable)} linear, convolution and norm layers; give one of these, or another model"
            )
    return Entries(eligible_masks(shapes, which, next(model.parameters()).device))


def eligible_masks(
    shapes: Mapping[str, torch.Size], which: Eligible, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The same as one bool mask per tensor, from the names and shapes of a model's parameters."""
    belongs = {"blocks": ".", "attention": ".attn.", "qk": ".attn.qkv.", "biases": ".bias"}[which]
    masks = {}
    for name, shape in shapes.items():
        if name.startswith(("blocks.", "net.")) and belongs in name and not name.endswith(".gamma"):
            masks[name] = torch.ones(shape, dtype=torch.bool, device=device)
            if len(parts(name, masks[name])) > 1 and name.endswith(".bias"):
                parts(name, masks[name])["k"].fill_(False)
            if which == "qk":
                parts(name, masks[name])["v"].fill_(False)
    return masks


def grouped(eligible: Entries, granularity: Granularity, heads: int) -> Groups | None:
    """Which eligible entries stay or go together; None: each for itself.

    row: the weights into one output; head: the rows of one of the ``heads`` attention heads in q, in k or in v, of
    other layers all; tensor: a whole tensor, where q, k and v of a block count as three. An entry of a bias or of a
    norm is a row of its own.
    """
    if granularity == "entry":
        return None
    ids, count = {}, 0
    for name, mask in eligible.masks.items():
        rows, tensors = len(mask), len(parts(name, mask))
        members = {"row": rows, "head": tensors * heads if tensors > 1 else 1, "tensor": tensors}[granularity]
        local = torch.arange(rows, device=mask.device) * members // rows + count
        ids[name] = local.view(-1, *[1] * (mask.dim() - 1)).expand(mask.shape)
        count += members
    of = eligible.gather(ids)
    return Groups(of, torch.bincount(of, minlength=count))


def soften(model: nn.Module, eligible: Entries, kept: Tensor, soft_zero: float) -> dict[str, Tensor]:
    """A copy of the eligible tensors in which entries no longer kept (E,) are multiplied by ``soft_zero``."""
    weights = {name: named_tensors(model)[name].clone() for name in eligible.masks}
    values = eligible.gather(weights)
    eligible.scatter(torch.where(kept, values, values * soft_zero), weights)
    return weights


def score_by_weights(
    criterion: Literal["lowest_magnitude", "highest_magnitude", "random"],
    model: nn.Module,
    eligible: Entries,
    seed: int,
    groups: Groups | None = None,
) -> Tensor:
    """Scores (E,), low = keep, of the rules that look at no data; the random ones are drawn per group."""
    if criterion == "random":
        count = len(eligible) if groups is None else len(groups.sizes)
        drawn = torch.rand(count, generator=torch_generator(seed, "random mask")).to(eligible.device)
        return drawn if groups is None else drawn[groups.of]
    magnitude = eligible.gather(named_tensors(model)).abs()
    return magnitude if criterion == "lowest_magnitude" else -magnitude


def keep_lowest(scores: Tensor, kept: Tensor, count: int, seed: int, iteration: int) -> Tensor:
    """The ``count`` lowest-scored of the ``kept`` entries as bool (E,): one global ranking, ties by a named draw.

    ``scores`` (E,) float32, ``kept`` bool (E,) with at least ``count`` True. One copy of the candidates' scores is
    partitioned, on the CPU; nothing is sorted.
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

    A group's score is the sum of its entries' scores (E,) per entry: by the bare sum, small tensors would always win.
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


def calibrate(
    score: Callable[[int, Tensor], Tensor],
    eligible: Entries,
    *,
    density: float,
    iterations: int,
    seed: int,
    start: tuple[int, Tensor] | None = None,
    groups: Groups | None = None,
) -> Iterator[Iteration]:
    """Yield R ever sparser masks; after round r exactly round(density^(r/R) E) eligible entries stay.

    ``score(r, kept)`` gives fresh scores (E,), low = keep, of the weights softened by ``kept`` (E,). ``start`` is a
    finished iteration to go on from. With ``groups``, whole groups stay, until the next would exceed that number. Once
    excluded, always excluded.
    """
    done, kept = start or (0, torch.ones(len(eligible), dtype=torch.bool, device=eligible.device))
    for number in range(done + 1, iterations + 1):
        count = round(density ** (number / iterations) * len(eligible))
        scores = score(number, kept)
        if groups is None:
            kept = keep_lowest(scores, kept, count, seed, number)
        else:
            kept = keep_lowest_groups(scores, kept, count, groups, seed, number)
        yield Iteration(number, kept, int(kept.sum()) / len(eligible))
