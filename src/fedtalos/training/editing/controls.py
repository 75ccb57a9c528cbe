"""Controls for TaLoS: masks of the same size that look at no images, by chance or by the weights' magnitude.

Letters: E eligible entries.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fedtalos.errors import InputError, check_word
from fedtalos.models.vision_transformer import parts
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.editing.eligible import Eligible, eligible_entries, eligible_masks, mask_of
from fedtalos.training.editing.ranking import Groups, entries_kept, keep_lowest
from fedtalos.training.entries import Entries, Mask, named_tensors

Control = Literal["lowest_magnitude", "highest_magnitude", "random"]
Scope = Literal["tensor", "global"]


def random_mask(model: nn.Module, density: float = 0.1, seed: int = 0, eligible: Eligible = "blocks") -> Mask:
    """A mask of eligible entries drawn at random: round(density E) of them.

    Raises InputError for a density that leaves no entry.

    >>> mask = random_mask(model, density=0.1)
    """
    return _mask_by_weights("random", model, density, seed, eligible)


def magnitude_mask(
    model: nn.Module, density: float = 0.1, *, largest: bool = True, seed: int = 0, eligible: Eligible = "blocks"
) -> Mask:
    """A mask of the largest eligible weights by magnitude, or of the smallest: round(density E) of them.

    ``seed`` draws among weights of equal magnitude. Raises InputError for a density that leaves no entry.

    >>> mask = magnitude_mask(model, density=0.1, largest=False)
    """
    return _mask_by_weights("highest_magnitude" if largest else "lowest_magnitude", model, density, seed, eligible)


def _mask_by_weights(criterion: Control, model: nn.Module, density: float, seed: int, eligible: Eligible) -> Mask:
    entries = eligible_entries(model, eligible)
    scores = score_by_weights(criterion, model, entries, seed)
    everything = torch.ones_like(scores, dtype=torch.bool)
    return mask_of(entries, keep_lowest(scores, everything, entries_kept(density, len(entries)), seed, 1))


def score_by_weights(
    criterion: Control, model: nn.Module, eligible: Entries, seed: int, groups: Groups | None = None
) -> Tensor:
    """Scores (E,), low = keep, of the rules that look at no images; random ones are drawn once per group.

    >>> scores = score_by_weights("lowest_magnitude", model, eligible_entries(model), seed=0)
    """
    if criterion == "random":
        count = len(eligible) if groups is None else len(groups.sizes)
        drawn = torch.rand(count, generator=torch_generator(seed, "random mask")).to(eligible.device)
        return drawn if groups is None else drawn[groups.of]
    magnitude = eligible.gather(named_tensors(model)).abs()
    return magnitude if criterion == "lowest_magnitude" else -magnitude


def random_like(mask: Mask, eligible_in: Eligible = "blocks", seed: int = 0, scope: Scope = "tensor") -> Mask:
    """A random mask as dense as another: in every tensor, where q, k and v are three, or only in all (global).

    ``eligible_in`` says which entries the other mask chose from. Raises InputError where it lets others move.

    >>> control = random_like(mask, seed=1)
    """
    check_word("scope", scope, Scope)
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, eligible_in)
    stray = [name for name, tensor in mask.items() if name not in eligible or bool((tensor & ~eligible[name]).any())]
    if stray:
        raise InputError(f"mask: lets entries of {stray[0]} move that are not eligible in {eligible_in}; give another")
    places = {
        name: [part.flatten().nonzero().squeeze(1) for part in parts(name, eligible[name]).values()] for name in mask
    }
    counts = [int(part.sum()) for name, tensor in mask.items() for part in parts(name, tensor).values()]
    if scope == "global":  # how many fall into each part when so many are drawn from all
        sizes = [len(found) for name in mask for found in places[name]]
        rng = generator(seed, "random mask", "global")
        counts = rng.multivariate_hypergeometric(sizes, sum(counts), method="marginals").tolist()
    drawn: Mask = {name: torch.zeros_like(tensor) for name, tensor in mask.items()}
    left = iter(counts)
    for name, tensor in drawn.items():
        rng = generator(seed, "random mask", scope, name)
        for part, found in zip(parts(name, tensor).values(), places[name], strict=True):
            chosen = rng.choice(len(found), next(left), replace=False, shuffle=False)
            part.view(-1)[found[torch.from_numpy(chosen)]] = True
    return drawn
