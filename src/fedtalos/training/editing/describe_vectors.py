"""Vectors described for people: norms by block and kind of layer, cosines, and facts in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedtalos.models.vision_transformer import parts
from fedtalos.training.editing.describe import KINDS, OUTSIDE, places
from fedtalos.training.editing.task_vectors import TaskVector, weighted_sum

VECTOR_KINDS = (*KINDS, "embed", "head")


@dataclass(frozen=True)
class NormRow:
    """Norm and support of a vector within one kind of tensor in one block."""

    block: int
    """From 0; OUTSIDE for the layers before and behind the blocks."""
    kind: str
    norm: float
    active: int
    entries: int

    @property
    def place(self) -> str:
        """The block as tables show it: its number, or "-" outside the blocks."""
        return "-" if self.block == OUTSIDE else str(self.block)


def norm_table(vector: TaskVector) -> list[NormRow]:
    """2-norms by block and kind, as ``density_table`` has them, and of the head and the embeddings.

    ``entries`` counts all entries of the tensors that the vector moves. Squared norms add up to that of the vector.

    >>> for row in norm_table(tau):
    ...     print(row.place, row.kind, f"{row.norm:.3f}")
    """
    found: dict[tuple[int, str], list[float]] = {}
    tensors = vector.tensors()
    for name, (block, kind) in places(vector.mask).items():
        tensor = tensors[name]
        if block == OUTSIDE:
            kind = _kind_outside(name)
        for part, values in parts(name, tensor).items():
            chosen = parts(name, vector.mask[name])[part]
            row = found.setdefault((block, kind if kind in ("norms", "biases") else part or kind), [0.0, 0, 0])
            row[0] += float(values.double().square().sum())
            row[1] += int(chosen.sum())
            row[2] += values.numel()
    ordered = sorted(found, key=lambda key: (key[0], VECTOR_KINDS.index(key[1])))
    return [NormRow(*key, math.sqrt(found[key][0]), int(found[key][1]), int(found[key][2])) for key in ordered]


def _kind_outside(name: str) -> str:
    """Kind of patch_embed.proj.weight, pos_embed, norm.bias, head.weight and the like."""
    first = name.split(".")[0]
    return {"head": "head", "norm": "norms", "patch_embed": "conv"}.get(first, "embed")


def cosines(vectors: Sequence[TaskVector]) -> NDArray[np.float64]:
    """Cosine of every two vectors, (V, V); nan with a vector of zeros. Entries outside a support are 0.

    >>> cosines([tau, tau, -tau])[0]
    array([ 1.,  1., -1.])
    """
    union = weighted_sum(vectors, [0.0] * len(vectors), "union").entries
    rows = []
    for vector in vectors:
        found = vector.tensors()
        dense = {name: found.get(name, torch.zeros(mask.shape)) for name, mask in union.masks.items()}
        rows.append(union.gather(dense).double())
    values = torch.stack(rows)
    values = values / values.norm(dim=1, keepdim=True)
    return np.asarray((values @ values.T).numpy())


def described(vector: TaskVector) -> dict[str, str]:
    """A vector's facts in words, by topic.

    >>> described(tau)["moves"]
    '68016 of 677482 entries (10.04 %)'
    """
    facts = vector.facts
    classes = f"{len(facts.classes)}" if facts.classes else "unknown"
    task = f"{len(facts.task)}: {', '.join(facts.task[:10])}{', ...' if len(facts.task) > 10 else ''}"
    return {
        "made by": f"{facts.command} (fedtalos {facts.version}, commit {facts.commit})",
        "moves": f"{len(vector)} of {facts.parameters} entries ({100 * vector.density:.4g} %)",
        "norm": f"{vector.norm:.4g}",
        "model": ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in facts.model.items()),
        "weights": facts.weights,
        "head": f"{facts.head}{'' if vector.head else ' (not in the file)'}",
        "classes": classes,
        "trained on": task if facts.task else "all classes, or unknown",
        **({"made from": ", ".join(facts.made_from)} if facts.made_from else {}),
        "fingerprint": vector.fingerprint,
    }
