"""Facts of a mask: how it was made, for which model and weights, and how a mask is known."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, get_args

import numpy as np
from annotated_types import MaxLen

from fedtalos._version import __version__
from fedtalos.errors import InputError
from fedtalos.facts import Count, Share, Word, schema
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.eligible import Eligible, eligible_masks, eligible_shapes
from fedtalos.training.entries import Mask

FORMAT = 3
SEVERAL = "several"
"""Said of a joined mask where its sources disagree; a number is None there."""


@schema
@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """Facts of how a mask was made, as its file's header holds them.

    Of a joined mask: what its sources agree on, else "several" or None. None also stands for what nobody knows.
    """

    format: Count = FORMAT
    version: Word
    criterion: Word
    fisher: Word  # the mode, or none
    fisher_samples: Count | None  # labels drawn per image and iteration
    iterations: Count | None
    granularity: Word
    eligible_in: Eligible
    eligible: Count
    active: Count
    target_density: Share | None
    soft_zero: Share | None
    calibration: Word
    clients: Count | None
    calibration_images: Count | None
    seed: Count | None
    model: Annotated[dict[Word, Word | Count], MaxLen(20)]
    weights: Word
    data: Word
    head: Word
    made_from: Annotated[tuple[Word, ...], MaxLen(2**14)] = ()  # fingerprints of masks that it joins, or is drawn like

    def __post_init__(self) -> None:
        # Files say 1, not true, of a yes or no: an architecture has both.
        plain = {name: int(value) if isinstance(value, bool) else value for name, value in self.model.items()}
        object.__setattr__(self, "model", plain)

    @property
    def density(self) -> float:
        """Density reached: True entries per eligible entry."""
        return self.active / self.eligible


def facts_of(mask: Mask, model: Backbone, criterion: str = "given") -> MaskFacts:
    """Facts of a mask of which nothing is known but the model that it is for.

    Raises InputError where the mask names other tensors or entries than the model's eligible ones.
    """
    if not criterion.isprintable() or not any(bool(tensor.any()) for tensor in mask.values()):
        raise InputError("mask: expected at least one entry that may move, and a criterion in plain words")
    rules: tuple[Eligible, ...] = get_args(Eligible)
    found = {rule: eligible_masks(eligible_shapes(model), rule) for rule in rules}
    exact = (rule for rule in rules if found[rule].keys() == mask.keys())
    wider = (rule for rule in rules if found[rule].keys() >= mask.keys())
    rule = next(chain(exact, wider), rules[0])
    for name, tensor in mask.items():
        allowed = found[rule].get(name)
        if allowed is None or allowed.shape != tensor.shape or bool((tensor.cpu() & ~allowed).any()):
            raise InputError(
                f"mask: {name} {tuple(tensor.shape)} is no eligible tensor of {model.architecture}, or more of it than "
                "is eligible may move; a mask file holds weights and biases of the layers inside the blocks, and where "
                "eligible is paper those of the patch convolution and of the norm behind the blocks"
            )
    return MaskFacts(
        version=__version__,
        criterion=criterion,
        fisher="unknown",
        fisher_samples=0,
        iterations=None,
        granularity="unknown",
        eligible_in=rule,
        eligible=sum(int(tensor.sum()) for tensor in found[rule].values()),
        active=sum(int(tensor.sum()) for tensor in mask.values()),
        target_density=None,
        soft_zero=None,
        calibration="unknown",
        clients=0,
        calibration_images=0,
        seed=None,
        model=model.architecture.as_dict(),
        weights=model.origin.fingerprint,
        data="unknown",
        head="unknown",
    )


def origin_differs(headers: Sequence[MaskFacts]) -> str:
    """The points in which masks' models and weights differ, with all values; empty where they are the same."""
    origins = [{**facts.model, "weights": facts.weights} for facts in headers]
    found = {
        what: list(dict.fromkeys(str(origin.get(what)) for origin in origins))
        for what in ("name", "size", "patch_size", "weights")
    }
    return "; ".join(f"{what} {' / '.join(values)}" for what, values in found.items() if len(values) > 1)


def fingerprint(mask: Mask) -> str:
    """A digest of the mask's bits and names, whatever its file says."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(mask.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(np.packbits(tensor.cpu().numpy().reshape(-1)).data)
    return digest.hexdigest()
