"""Task vectors: what training changed of a model, as an object that adds, scales and is applied to the base again.

    tau = theta_after - theta_before, on the entries that moved      (Ilharco et al., 2023, arXiv 2212.04089)

Shapes: A entries of a vector's support, C classes, D width.
"""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedtalos._version import __version__
from fedtalos.errors import InputError, shown
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import Head
from fedtalos.notes import note
from fedtalos.training.editing.mask_facts import SEVERAL, fingerprint
from fedtalos.training.editing.vector_facts import VectorFacts, differs_in, facts_of
from fedtalos.training.entries import Entries, Mask, named_tensors


@dataclass(frozen=True, eq=False)
class TaskVector:
    """A change of a model's parameters on a support: the True entries of a mask.

    Vectors of one base add (``first + second``, on the union of the supports), and scale (``0.3 * tau``, ``-tau``).
    Sums are formed in float64 and rounded once. Raises InputError for values that are not finite or no entries.

    >>> tau = task_vector(before, after)
    >>> len(tau), tau.density, tau.norm
    (532531, 0.1, 1.7)
    >>> both = tau + other          # learn two tasks
    >>> without = apply(model, -tau)  # forget one
    """

    mask: Mask
    """Parameter name -> bool tensor of its shape, on the CPU; every one holds a True."""
    values: Tensor
    """(A,) float32 on the CPU, in the mask's order."""
    facts: VectorFacts
    head: Head | None = field(default=None, repr=False)
    """The base's head, (C, D) and (C,), so that whoever has the weights alone can rebuild the base."""

    def __post_init__(self) -> None:
        mask = {name: tensor.cpu() for name, tensor in self.mask.items() if bool(tensor.any())}
        values = self.values.detach().cpu().float()
        if not mask:
            raise InputError("task vector: expected at least one entry that moved, got none; nothing was changed")
        if len(values) != sum(int(tensor.sum()) for tensor in mask.values()):
            raise InputError("task vector: expected one value for each entry of its support, got another number")
        if not bool(values.isfinite().all()):
            raise InputError("task vector: holds NaN or infinity; give a model whose training did not diverge")
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def entries(self) -> Entries:
        """The support, as entries that can be gathered and written."""
        return Entries(self.mask)

    @property
    def density(self) -> float:
        """Share of the base's entries that the support has."""
        return len(self) / self.facts.parameters

    @property
    def norm(self) -> float:
        """2-norm."""
        return float(self.values.double().norm())

    @property
    def fingerprint(self) -> str:
        """A digest of the support and the values."""
        digest = hashlib.blake2b(fingerprint(self.mask).encode(), digest_size=16)
        digest.update(self.values.numpy().tobytes())
        return digest.hexdigest()

    def parts(self) -> dict[str, Tensor]:
        """Its values by tensor, as flat views, (A_name,) each."""
        counts = [int(tensor.sum()) for tensor in self.mask.values()]
        return dict(zip(self.mask, self.values.split(counts), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Its values as tensors of the parameters' shapes, 0 outside the support; for the tensors that it moves."""
        return self.entries.unflatten(self.values)

    def __add__(self, other: "TaskVector") -> "TaskVector":
        return weighted_sum((self, other), (1.0, 1.0), "sum of 2 vectors")

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return weighted_sum((self, other), (1.0, -1.0), "difference of 2 vectors")

    def __neg__(self) -> "TaskVector":
        return changed(self, -self.values, f"negated {self.facts.command}")

    def __mul__(self, factor: float) -> "TaskVector":
        return changed(self, scaled(self.values, factor), f"{factor:g} times {self.facts.command}")

    __rmul__ = __mul__


def task_vector(
    before: Backbone | Mapping[str, Tensor],
    after: Backbone | Mapping[str, Tensor],
    mask: Mask | None = None,
    *,
    classes: Sequence[str] = (),
    task: Sequence[str] = (),
    command: str = "given",
    commit: str = "unknown",
) -> TaskVector:
    """Subtract a model before training from the same model after it.

    ``before`` and ``after`` are models, or their parameters by name; one of them is a model, which says of which
    weights the vector is. The support is ``mask``, or else the entries that moved; entries that moved outside a mask
    are left out, which is noted. The base's head comes along. ``classes`` name the head's outputs, ``task`` those that
    were trained on.

    Raises InputError where names or shapes differ, where nothing moved, for values that are not finite, and for classes
    that are not the head's.

    >>> before = copy.deepcopy(model)
    >>> for round in fedavg(model, clients, mask, rounds=10, local=local):
    ...     pass
    >>> tau = task_vector(before, model, mask, classes=data.classes)
    """
    model = after if isinstance(after, Backbone) else before
    if not isinstance(model, Backbone):
        raise InputError("before and after: expected at least one model, which says of which weights the vector is")
    old, new = (named_tensors(it) if isinstance(it, Backbone) else it for it in (before, after))
    for name, tensor in named_tensors(model).items():
        for what, tensors in (("before", old), ("after", new)):
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise InputError(f"{what}: {name} is not there, or of another shape; give the same model twice")
    moved = {name: (old[name] != new[name].to(old[name].device)).cpu() for name in named_tensors(model)}
    support = moved if mask is None else {name: tensor.cpu() for name, tensor in mask.items()}
    for name, tensor in support.items():
        if name not in moved or moved[name].shape != tensor.shape:
            raise InputError(f"mask: {name} {tuple(tensor.shape)} is no parameter of this model; give its own mask")
    if left_out := sum(int((t & ~support[n]).sum()) if n in support else int(t.sum()) for n, t in moved.items()):
        note("task vector", f"{left_out} entries moved outside the mask and are left out of the vector")
    if not any(bool(tensor.any()) for tensor in support.values()):
        if mask is not None:
            raise InputError("mask: lets nothing move; give another")
        raise InputError("task vector: before and after are the same; train in between, or give other models")
    entries = Entries({name: tensor for name, tensor in support.items() if bool(tensor.any())})
    theta = [entries.gather({n: t[n].detach().cpu().float() for n in entries.masks}) for t in (old, new)]
    weight, bias = (old[f"head.{name}"].detach().cpu().clone() for name in ("weight", "bias"))
    head = (weight, bias)
    facts = facts_of(model, head, classes=classes, task=task, command=command, commit=commit)
    return TaskVector(entries.masks, theta[1] - theta[0], facts, head)


def apply(model: Backbone, *vectors: TaskVector, alpha: float = 1.0) -> Backbone:
    """Add ``alpha`` times the sum of vectors to a copy of the model; the model itself stays as it is.

    Subtracting again (``alpha`` negated) gives every entry back to 2**-23 of the larger of its two values; a vector of
    one training at ``alpha`` 1 to the bit, where that training at most halved or doubled the entry (Sterbenz' lemma).
    Keep the base where every bit counts.

    Raises InputError for vectors of other weights or shapes, a factor that is not finite, and a sum that overflows.

    >>> edited = apply(model, tau_of_cats, tau_of_dogs, alpha=0.4)
    >>> without = apply(edited, tau_of_cats, alpha=-0.4)
    """
    if not vectors:
        raise InputError("vectors: expected at least one to apply, got none")
    for vector in vectors:
        check_fits(vector, model)
    total = vectors[0] if len(vectors) == 1 else weighted_sum(vectors, [1.0] * len(vectors), "sum")
    edited = copy.deepcopy(model)
    write_edit(edited, model, total, alpha)
    return edited


def write_edit(edited: Backbone, model: Backbone, vector: TaskVector, alpha: float) -> None:
    """Write theta + alpha tau into ``edited``, a copy of the model, on the vector's support; InputError on overflow."""
    device = next(model.parameters()).device
    entries = Entries({name: tensor.to(device) for name, tensor in vector.mask.items()})
    values = entries.gather(named_tensors(model)) + scaled(vector.values, alpha).to(device)
    if not bool(values.isfinite().all()):
        raise InputError(f"alpha {alpha:g}: the edited model would hold infinity; take a smaller one")
    entries.scatter(values, named_tensors(edited))


def scaled(values: Tensor, factor: float) -> Tensor:
    """Values (A,) times a factor, rounded once; InputError for a factor that is no finite number."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        raise InputError(f"alpha {shown(factor)}: expected a finite number, such as 0.4")
    return (values.double() * factor).float()


def changed(vector: TaskVector, values: Tensor, command: str) -> TaskVector:
    """A vector of the same support, base and task with other values."""
    return replace(vector, values=values, facts=replace(vector.facts, command=command))


def weighted_sum(vectors: Sequence[TaskVector], factors: Sequence[float], command: str) -> TaskVector:
    """Add vectors, each times its factor, on the union of their supports: in float64, rounded once.

    Raises InputError for vectors of different bases.

    >>> mean = weighted_sum([tau_of_cats, tau_of_dogs], [0.5, 0.5], "mean")
    """
    check_together(vectors)
    parts = [vector.parts() for vector in vectors]
    mask, found = {}, []
    for name, together in union(vectors).items():
        total = torch.zeros(together.shape, dtype=torch.float64)
        for vector, part, factor in zip(vectors, parts, factors, strict=True):
            if name in part:
                total[vector.mask[name]] += part[name].double() * factor
        mask[name] = together
        found.append(total[together].float())
    return joined(vectors, mask, torch.cat(found), command)


def union(vectors: Sequence[TaskVector]) -> Mask:
    """Entries that are in the support of any of the vectors."""
    mask: Mask = {}
    for vector in vectors:
        for name, tensor in vector.mask.items():
            mask[name] = mask[name] | tensor if name in mask else tensor
    return mask


def joined(vectors: Sequence[TaskVector], mask: Mask, values: Tensor, command: str) -> TaskVector:
    """A vector made of others, with the facts in which these agree; ``task`` is what all were trained on together."""
    facts = [vector.facts for vector in vectors]

    def agreed(values: list[str]) -> str:
        return values[0] if len(set(values)) == 1 else SEVERAL

    one_head = len({each.head for each in facts}) == 1
    task = tuple(dict.fromkeys(name for each in facts for name in each.task)) if all(f.task for f in facts) else ()
    made = replace(
        facts[0],
        head=agreed([each.head for each in facts]),
        classes=next((each.classes for each in facts if each.classes), ()),
        task=task,
        version=__version__,
        command=command,
        commit=agreed([each.commit for each in facts]),
        made_from=tuple(vector.fingerprint for vector in vectors),
    )
    return TaskVector(mask, values, made, vectors[0].head if one_head else None)


def check_together(vectors: Sequence[TaskVector]) -> None:
    """Refuse vectors that do not add, with an InputError that says what differs."""
    if not vectors:
        raise InputError("vectors: expected at least one, got none")
    first, *others = [vector.facts for vector in vectors]
    for other in others:
        if differs := differs_in(first, other):
            raise InputError(f"vectors: of different bases ({differs}), so they do not add; give vectors of one base")
        if first.classes and other.classes and first.classes != other.classes:
            raise InputError(
                f"vectors: of different classes ({shown(first.classes)} / {shown(other.classes)}), so they do not add; "
                "give vectors made with one head"
            )
    for name in {name for vector in vectors for name in vector.mask}:
        if len({vector.mask[name].shape for vector in vectors if name in vector.mask}) > 1:
            raise InputError(f"vectors: {name} differs in shape, so they do not add; give vectors of one image size")
    moves_head = any(name.startswith("head.") for vector in vectors for name in vector.mask)
    if moves_head and len({vector.facts.head for vector in vectors}) > 1:
        raise InputError("vectors: move different heads, so they do not add; make them with one head, or a frozen one")


def check_fits(vector: TaskVector, model: Backbone) -> None:
    """Refuse a vector that was made on other weights than this model's, with an InputError that says what differs."""
    here = replace(vector.facts, weights=model.origin.fingerprint, model=model.architecture.as_dict())
    if differs := differs_in(vector.facts, here):
        raise InputError(
            f"vector: not made on this model: {differs} (the vector's first); give the model that it was made on, or a "
            "vector of this one"
        )
    parameters = named_tensors(model)
    for name, tensor in vector.mask.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such tensor"
            raise InputError(
                f"vector: {name} has shape {tuple(tensor.shape)}, here {found}; give a model of the image size and the "
                "classes that it was made with"
            )
