"""Facts of a task vector: its base, its classes, and how it came to be.

Shapes: C classes, D width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import MaxLen

from fedtalos._version import __version__
from fedtalos.errors import InputError
from fedtalos.facts import ClassNames, Count, Word, schema
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import Head
from fedtalos.models.weights.pixels import Crop, Interpolation, Middle, Width


@schema
@dataclass(frozen=True, kw_only=True)
class VectorFacts:
    """Facts of a vector, as its file's header holds them.

    >>> tau.facts.weights, tau.facts.task
    ('3f1c...', ('cat', 'dog'))
    """

    weights: Word
    """Fingerprint of the base's weights, as ``model.origin`` has it."""
    model: Annotated[dict[Word, Word | Count], MaxLen(20)]
    """Sizes of the base."""
    parameters: Count
    """Entries of the base, head included."""
    mean: tuple[Middle, Middle, Middle] = (0.5, 0.5, 0.5)
    """Mean by channel of the pixels that the base takes."""
    std: tuple[Width, Width, Width] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bilinear"
    crop: Crop = 1.0
    head: Word = "unknown"
    """Fingerprint of the base's head."""
    classes: ClassNames = ()
    """Names of the head's classes; empty where nobody said."""
    task: ClassNames = ()
    """Names of the classes that it was trained on; empty: all of them, or nobody said."""
    command: Word = "given"
    """The command or rule that made it, in a few words."""
    version: Word = __version__
    commit: Word = "unknown"
    """Git commit of the code that made it."""
    made_from: Annotated[tuple[Word, ...], MaxLen(2**14)] = ()
    """Fingerprints of the vectors that it was made of."""

    def __post_init__(self) -> None:
        # Files say 1, not true, of a yes or no: an architecture has both.
        plain = {name: int(value) if isinstance(value, bool) else value for name, value in self.model.items()}
        object.__setattr__(self, "model", plain)


def facts_of(
    model: Backbone,
    head: Head,
    *,
    classes: Sequence[str] = (),
    task: Sequence[str] = (),
    command: str = "given",
    commit: str = "unknown",
) -> VectorFacts:
    """Facts of a vector of this model, which had this head, (C, D) and (C,), when training began.

    Raises InputError for classes that are not as many as the head's, and a task that is not of them.

    >>> facts = facts_of(model, head, task=("cat", "dog"))
    >>> tau = TaskVector(moving.entries.masks, moving.vector() - start, facts, head)
    """
    if classes and len(classes) != len(head[1]):
        raise InputError(f"classes: expected a name for each of the head's {len(head[1])} outputs, got {len(classes)}")
    if classes and (strange := [name for name in task if name not in classes]):
        raise InputError(f"task: {strange[0]!r} is none of the classes; give names of these")
    return VectorFacts(
        weights=model.origin.fingerprint,
        model=model.architecture.as_dict(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mean=model.mean,
        std=model.std,
        interpolation=model.interpolation,
        crop=model.crop,
        head=head_fingerprint(head),
        classes=tuple(classes),
        task=tuple(task),
        command=command,
        commit=commit,
    )


def differs_in(first: VectorFacts, second: VectorFacts) -> str:
    """The points in which two bases differ, with both values; empty where they are one.

    >>> differs_in(tau.facts, other.facts)
    'weights 3f1c... / 08ae...'
    """
    found = {
        what: (first.model.get(what), second.model.get(what))
        for what in ("name", "size", "patch_size")
        if first.model.get(what) != second.model.get(what)
    }
    if first.weights != second.weights:
        found["weights"] = (first.weights, second.weights)
    return "; ".join(f"{what} {one} / {other}" for what, (one, other) in found.items())


def head_fingerprint(head: Head) -> str:
    """A digest of a head's weight (C, D) and bias (C,).

    >>> head_fingerprint((model.head.weight, model.head.bias)) == tau.facts.head
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in head:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
