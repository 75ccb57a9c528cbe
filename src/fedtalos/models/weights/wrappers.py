"""Wrapped state dicts: the one ViT found among nested containers, prefixes, teachers, students and optimisers.

Nested dicts become dotted names first, so that a container and a prefix are the same thing: {"teacher": {"backbone.x"}}
holds teacher.backbone.x. A ViT is where a patch embedding is; what stands before its name is the ViT's prefix.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedtalos.errors import InputError, shown
from fedtalos.notes import note

_DEEPEST = 8
"""Dicts inside one another that are looked into."""

_WITHOUT_MEANING = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Parts of names that data-parallel, compiled and sharded training put anywhere."""

_SURE = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
_LIKELY = ("cls_token", "embeddings.cls_token")
"""Names that tell where a ViT is, in timm's and transformers' words."""

_FIRST = re.compile(r"(^|[._])(teacher|target|ema|swa|averaged)([._]|$)")
"""Averages of the weights over training: what teachers and published figures use."""
_LAST = re.compile(r"(^|[._])(student|momentum|encoder_k|key)([._]|$)")
"""Weights that their own authors leave behind (DINO's student, MoCo's momentum encoder)."""

_CLASSIFIERS = ("head", "classifier", "fc")
"""Names of a linear layer beside a wrapped ViT that is its head."""
_PRETRAINING = re.compile(
    r"(head\.(?!weight$|bias$)|(dino_head|ibot_head|projector|projection_head|predictor|prototypes)\.|fc\.fc)"
)
"""Heads of pretraining (DINO, iBOT, MoCo, MSN) inside a wrapped ViT."""
_DECODER = re.compile(r"decoder(_blocks|_embed|_pos_embed|_norm|_pred|\.)")
"""MAE's decoder, which lies beside the ViT without a wrapper."""


def flat(label: str, content: object) -> dict[str, Tensor]:
    """Collect the tensors of nested dicts under names joined by dots, without parts of wrappers that say nothing.

    Raises InputError where two names become one.

    >>> list(flat("vit.pth", {"model": {"module.cls_token": torch.zeros(1, 1, 192)}, "epoch": 3}))
    ['model.cls_token']
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for full, tensor in _walk(content, "", _DEEPEST, set()):
        name = ".".join(part for part in full.split(".") if part not in _WITHOUT_MEANING)
        if name in found:
            raise InputError(
                f"weights {label}: {shown(found[name][0])} and {shown(full)} both mean {shown(name)}; save one of them"
            )
        found[name] = full, tensor
    return {name: tensor for name, (_, tensor) in found.items()}


def _walk(content: object, prefix: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, Mapping) or depth == 0 or id(content) in seen:
        return
    seen.add(id(content))  # a hostile dict may hold itself
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            if "/" not in name:
                yield name, value
        else:
            yield from _walk(value, f"{name}.", depth - 1, seen)


def inner_vit(label: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of the one ViT among ``tensors``, its prefix removed; all of them where there is no ViT.

    Of several, a teacher's or averaged weights come first, a student's or a momentum encoder's last. A linear head
    beside a wrapped ViT is taken along. A sentence in the notes says which was taken, and what was left out.

    Raises InputError where nothing says which of several to take.

    >>> list(inner_vit("vit.pth", flat("vit.pth", {"model": {"vit.cls_token": torch.zeros(1, 1, 192)}})))
    ['cls_token']
    """
    prefix, others = _chosen(label, tensors)
    if prefix is None:
        return dict(tensors)
    taken = {
        name: name.removeprefix(prefix)
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not _unused(name.removeprefix(prefix), tensor, wrapped=bool(prefix))
    }
    inside = {short: tensors[name] for name, short in taken.items()}
    for name, short in _head_beside(prefix, inside, tensors).items():
        taken[name] = short
        inside[short] = tensors[name]
    left = [name for name in tensors if name not in taken and not name.startswith("optim") and tensors[name].dim()]
    if left:
        where = f"the ViT under {prefix.removesuffix('.')}" if prefix else "the ViT"
        instead = f", not that under {' or '.join(shown(other.removesuffix('.')) for other in others)}" if others else ""
        some = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        note("weights file", f"{label}: {where} was taken{instead}; {len(left)} tensors were left out ({some})")
    return inside


def _chosen(label: str, tensors: Mapping[str, Tensor]) -> tuple[str | None, list[str]]:
    """Choose the prefix of the ViT to take, and name those of the others; None: there is no ViT."""
    prefixes = _prefixes(tensors, _SURE) or _prefixes(tensors, _LIKELY)
    if not prefixes:
        return None, []
    best = min(map(_rank, prefixes))
    first, *rest = [prefix for prefix in prefixes if _rank(prefix) == best]
    for other in rest:
        if not _same(first, other, tensors):
            raise InputError(
                f"weights {label}: holds several ViTs, under {shown(first)} and {shown(other)}, and nothing says which "
                "one to take; save its state dict alone"
            )
    return first, [prefix for prefix in prefixes if _rank(prefix) != best]


def _prefixes(tensors: Mapping[str, Tensor], anchors: Sequence[str]) -> list[str]:
    found = (
        name.removesuffix(anchor)
        # An anchor in timm's words may end one in transformers' words, so the longer ones come first.
        for name in tensors
        for anchor in sorted(anchors, key=len, reverse=True)
        if f".{name}".endswith(f".{anchor}")
    )
    return list(dict.fromkeys(prefix for prefix in found if not prefix.endswith("embeddings.")))


def _rank(prefix: str) -> int:
    """Order of choice: 0 averaged weights, 1 plain ones, 2 those that are left behind."""
    return 2 if _LAST.search(prefix) else 0 if _FIRST.search(prefix) else 1


def _same(one: str, other: str, tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the same tensors stand under both prefixes, as where a module is registered twice."""
    left = {name.removeprefix(one): tensor for name, tensor in tensors.items() if name.startswith(one)}
    right = {name.removeprefix(other): tensor for name, tensor in tensors.items() if name.startswith(other)}
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _unused(name: str, tensor: Tensor, *, wrapped: bool) -> bool:
    """Tell whether a tensor belongs to pretraining, or counts something, rather than to a ViT."""
    counts = tensor.dim() == 0 and not tensor.is_floating_point()
    return counts or bool(_DECODER.match(name)) or (wrapped and bool(_PRETRAINING.match(name)))


def _head_beside(prefix: str, inside: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find a linear head on the ViT's features among its neighbours: names in the file -> names in the ViT."""
    width = next((tensor.shape[-1] for name, tensor in inside.items() if name.endswith("cls_token") and tensor.dim()), 0)
    parts = prefix.split(".")[:-1]
    if any(name.startswith(("head.", "classifier.")) for name in inside):
        return {}
    for length in range(len(parts) - 1, -1, -1):
        outer = "".join(f"{part}." for part in parts[:length])
        for name in _CLASSIFIERS:
            weight = tensors.get(f"{outer}{name}.weight")
            if weight is not None and weight.dim() == 2 and weight.shape[1] == width:
                return {f"{outer}{name}.{end}": f"head.{end}" for end in ("weight", "bias") if f"{outer}{name}.{end}" in tensors}
    return {}
