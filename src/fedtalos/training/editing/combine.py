"""Several masks of one model: how much they overlap, and one mask joined from them by votes."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch

from fedtalos._version import __version__
from fedtalos.errors import InputError, check_word
from fedtalos.models.vision_transformer import parts
from fedtalos.training.editing.eligible import Eligible, eligible_masks
from fedtalos.training.editing.mask_facts import SEVERAL, MaskFacts, fingerprint
from fedtalos.training.entries import Mask

JoinRule = Literal["union", "intersection", "majority", "vote"]


def overlap(first: Mask, second: Mask) -> float:
    """Intersection over union of two masks' True entries (1 where both are empty); a tensor not there is all False.

    Raises InputError where tensors of one name differ in shape.

    >>> overlap(mask, random_mask(model, density=0.1))
    0.0527
    """
    shared = first.keys() & second.keys()
    if any(first[name].shape != second[name].shape for name in shared):
        raise InputError("masks: made for different models, so their overlap has no meaning")
    both = sum(int((first[name] & second[name]).sum()) for name in shared)
    either = sum(int(tensor.sum()) for mask in (first, second) for tensor in mask.values()) - both
    return both / either if either else 1.0


def chance_overlap(first: Mask, second: Mask, eligible_in: tuple[Eligible, Eligible] = ("blocks", "blocks")) -> float:
    """Overlap that random masks would have: of the same eligible entries, and of the same densities per tensor.

    The expected intersection over the expected union; q, k and v count as tensors of their own. ``eligible_in`` says
    among which entries each mask chooses. Where masks agree on which tensors may move, this is far above what their
    densities in all would give, so it is what an overlap is to be compared with. Raises InputError as ``overlap`` does.

    >>> overlap(first, second), chance_overlap(first, second)
    (0.7, 0.55)
    """
    both = 0.0
    for name in first.keys() & second.keys():
        if first[name].shape != second[name].shape:
            raise InputError("masks: made for different models, so their overlap has no meaning")
        shape, every = first[name].shape, torch.ones(first[name].shape, dtype=torch.bool)
        allowed = [eligible_masks({name: shape}, rule).get(name, every) for rule in eligible_in]
        divided = [parts(name, tensor) for tensor in (first[name].cpu(), second[name].cpu(), *allowed)]
        for of_first, of_second, choices, others in zip(*(part.values() for part in divided), strict=True):
            pairs = int(choices.sum()) * int(others.sum())
            if pairs:  # a share of each, independent of the other's
                both += int(of_first.sum()) * int(of_second.sum()) * int((choices & others).sum()) / pairs
    either = sum(int(tensor.sum()) for mask in (first, second) for tensor in mask.values()) - both
    return both / either if either else 1.0


def combine_masks(masks: Sequence[Mask], rule: JoinRule = "union", quorum: float = 0.5) -> Mask:
    """The mask of the entries that enough masks let move: one, all, more than half, or of vote a share ``quorum``.

    Raises InputError for masks of different tensors, or where no entry has the votes.

    >>> mask = combine_masks([mask_of_a, mask_of_b], "intersection")
    """
    if not masks:
        raise InputError("masks: expected at least one to combine, got none")
    check_same_tensors(masks)
    needed = votes_needed(rule, len(masks), quorum)
    joined = {name: torch.stack([mask[name] for mask in masks]).sum(0) >= needed for name in masks[0]}
    if not any(bool(tensor.any()) for tensor in joined.values()):
        raise InputError(
            f"masks: no entry may move in {needed} of the {len(masks)} masks; take rule union, or rule vote with a "
            "smaller quorum"
        )
    return joined


def check_same_tensors(masks: Sequence[Mask]) -> None:
    """Raise InputError where masks do not speak of the same tensors."""
    shapes = [{name: tensor.shape for name, tensor in mask.items()} for mask in masks]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError("masks: made for different models or eligible tensors, so they cannot be joined")


def votes_needed(rule: JoinRule, masks: int, quorum: float = 0.5) -> int:
    """Number of masks, of so many, that must let an entry move for the joined mask to let it.

    >>> votes_needed("majority", 4)
    3
    """
    check_word("rule", rule, JoinRule)
    match rule:
        case "union":
            return 1
        case "intersection":
            return masks
        case "majority":
            return masks // 2 + 1
        case "vote":
            if not 0 < quorum <= 1:
                raise InputError(f"quorum {quorum}: expected a share above 0 and at most 1, such as 0.5")
            return max(1, math.ceil(quorum * masks - 1e-9))  # 0.7 x 10 is a little above 7


def joined_facts(rule: str, masks: Sequence[Mask], headers: Sequence[MaskFacts], active: int) -> MaskFacts:
    """Facts of a mask of so many True entries, joined from these: what agrees is kept."""
    agreed = {field.name: _agreed([getattr(facts, field.name) for facts in headers]) for field in fields(MaskFacts)}
    criteria = ", ".join(sorted({facts.criterion for facts in headers}))
    changes = {
        "version": __version__,
        "criterion": f"{rule} of {len(masks)} masks ({criteria})",
        "model": {
            key: value if all(facts.model.get(key) == value for facts in headers) else SEVERAL
            for key, value in headers[0].model.items()
        },
        "active": active,
        # These do not add up: the same clients and images may be behind several masks.
        **{what: None for what in ("clients", "calibration_images") if any(getattr(f, what) != 0 for f in headers)},
        "made_from": tuple(fingerprint(mask) for mask in masks),
    }
    return MaskFacts(**{**agreed, **changes})


def _agreed(values: Sequence[Any]) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    return SEVERAL if isinstance(values[0], str) else None
