"""TaLoS: scores -> mask, refined in rounds (Iurada, Ciccone and Tommasi, ICLR 2025, section 4.2 and algorithm 1).

The mask keeps the entries with the lowest scores: what the pretrained task is least sensitive to may move, all else
is frozen. Letters: E eligible entries, R iterations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedtalos.parameters import Entries, named_tensors
from fedtalos.randomness import generator, torch_generator

Criterion = Literal["least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random"]


@dataclass(frozen=True)
class Iteration:
    """One refinement: its number (1..R), which eligible entries (E,) stay True, and their share."""

    number: int
    kept: Tensor
    density: float


def eligible_entries(model: nn.Module) -> Entries:
    """Weights and biases of the layers inside the blocks, but for the key third of each qkv bias.

    That third has exactly zero gradient: it shifts all logits of a softmax row alike.
    """
    masks = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            masks[name] = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
            if name.endswith("attn.qkv.bias"):
                masks[name].view(3, -1)[1] = False
    return Entries(masks)


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
) -> Tensor:
    """Scores (E,), low = keep, of the rules that look at no data."""
    magnitude = eligible.gather(named_tensors(model)).abs()
    if criterion == "random":
        return torch.rand(len(eligible), generator=torch_generator(seed, "random mask")).to(magnitude.device)
    return magnitude if criterion == "lowest_magnitude" else -magnitude


def keep_lowest(scores: Tensor, candidates: Tensor, count: int, seed: int, iteration: int) -> Tensor:
    """The ``count`` lowest-scored candidates as bool (E,): one global ranking, exact, ties by a named random draw.

    ``scores`` (E,), ``candidates`` bool (E,) with at least ``count`` True.
    """
    device, scores, candidates = scores.device, scores.cpu(), candidates.cpu()  # not every device has kthvalue
    kept = torch.zeros_like(candidates)
    if count == 0:
        return kept.to(device)
    ranked = scores[candidates]
    threshold = ranked.kthvalue(count).values
    kept[candidates] = ranked < threshold
    ties = (candidates & (scores == threshold)).nonzero().squeeze(1)
    missing = count - int(kept.sum())
    order = generator(seed, "ties", iteration).permutation(len(ties))[:missing]
    kept[ties[torch.from_numpy(order)]] = True
    return kept.to(device)


def calibrate(
    score: Callable[[int, Tensor], Tensor],
    eligible: Entries,
    *,
    density: float,
    iterations: int,
    seed: int,
    start: tuple[int, Tensor] | None = None,
) -> Iterator[Iteration]:
    """Yield R ever sparser masks; after round r exactly round(density^(r/R) E) eligible entries stay.

    ``score(r, kept)`` gives fresh scores (E,), low = keep, of the weights softened by ``kept`` (E,). ``start`` is a
    finished iteration to go on from. Once excluded, always excluded.
    """
    done, kept = start or (0, torch.ones(len(eligible), dtype=torch.bool, device=eligible.device))
    for number in range(done + 1, iterations + 1):
        count = round(density ** (number / iterations) * len(eligible))
        kept = keep_lowest(score(number, kept), kept, count, seed, number)
        yield Iteration(number, kept, count / len(eligible))
