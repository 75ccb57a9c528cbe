"""What mask headers say: in words, in which of them masks differ, and of a mask joined from several."""

from collections.abc import Sequence
from typing import Any

from fedtalos import __version__
from fedtalos.training.editing.mask_file import Mask, MaskFacts, fingerprint

SEVERAL = "several"


def joined_facts(rule: str, masks: Sequence[Mask], headers: Sequence[MaskFacts], active: int) -> MaskFacts:
    """The header of a mask of so many True entries, joined from these: what agrees is kept."""
    agreed = {name: _agreed([getattr(facts, name) for facts in headers]) for name in MaskFacts.model_fields}
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


def in_words(facts: MaskFacts) -> dict[str, str]:
    """What the header says, for people."""
    labels = f", labels drawn per image: {_number(facts.fisher_samples)}" if facts.fisher == "true" else ""
    clients = f" of {_number(facts.clients)} clients" if facts.clients != 0 else ""
    images = f", {_number(facts.calibration_images)} images{clients}" if facts.calibration_images != 0 else ""
    return {
        "made by": f"fedtalos {facts.version} (format {facts.format})",
        "criterion": facts.criterion,
        "Fisher": facts.fisher + labels,
        "rounds": f"{_number(facts.iterations)}, excluded entries times {_number(facts.soft_zero)}",
        "calibration": facts.calibration + images,
        "granularity": facts.granularity,
        "eligible": f"{facts.eligible} entries ({facts.eligible_in})",
        "may move": f"{facts.active} entries",
        "density": f"{100 * facts.density:.4g} %",
        "density asked": SEVERAL if facts.target_density is None else f"{100 * facts.target_density:.4g} %",
        "seed": _number(facts.seed),
        "model": ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in facts.model.items()),
        "weights": facts.weights,
        "data": facts.data,
        "head": facts.head,
        **({"made from": ", ".join(facts.made_from)} if facts.made_from else {}),
    }


def differences(described: Sequence[dict[str, str]]) -> dict[str, str]:
    """For each fact in which masks differ: its values, each with the numbers (from 1) of the masks that have it."""
    found = {}
    for fact in dict.fromkeys(fact for words in described for fact in words):
        who: dict[str, list[str]] = {}
        for number, words in enumerate(described, 1):
            who.setdefault(words.get(fact, "none"), []).append(str(number))
        if len(who) > 1:
            found[fact] = "; ".join(f"{value} ({', '.join(numbers)})" for value, numbers in who.items())
    return found


def _number(value: float | None) -> str:
    return SEVERAL if value is None else str(value)


def _agreed(values: Sequence[Any]) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    return SEVERAL if isinstance(values[0], str) else None
