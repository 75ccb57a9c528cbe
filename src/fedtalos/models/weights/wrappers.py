"""Wrapped state dicts: the one ViT found among nested containers, prefixes, teachers, students and optimisers.

Nested dicts become dotted names first, so that a container and a prefix are the same thing: {"teacher": {"backbone.x"}}
holds teacher.backbone.x. A ViT is where a patch embedding is; what stands before its name is the ViT's prefix.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedtalos.errors import InputError, shown
from fedtalos.facts import refusal
from fedtalos.notes import note

OUR_NAMES = "give a ViT with the parameter names of timm, DINO or transformers"
"""Advice where tensors are of other names."""
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
        if not isinstance(key, str | int):
            continue  # other keys may be endless to write out
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            if "/" not in name:
                yield name, value
        else:
            yield from _walk(value, f"{name}.", depth - 1, seen)


def inner_vit(label: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of the one ViT among ``tensors``, its prefix removed.

    Of several, a teacher's or averaged weights come first, a student's or a momentum encoder's last. A linear head
    beside a wrapped ViT is taken along. A note says what was left out.

    Raises InputError where there is none, or where nothing says which of several to take.

    >>> list(inner_vit("vit.pth", flat("vit.pth", {"model": {"vit.cls_token": torch.zeros(1, 1, 192)}})))
    ['cls_token']
    """
    prefixes = _prefixes(tensors, _SURE) or _prefixes(tensors, _LIKELY)
    if not prefixes and not any(tensor.is_floating_point() for tensor in tensors.values()):
        raise InputError(f"weights {label}: whole numbers alone, as a mask file holds them; give weights in float32")
    if not prefixes:
        raise refusal(
            f"weights {label}: no cls_token of 3 dimensions and no patch embedding among its {len(tensors)} tensors",
            some_names(list(tensors)),
            OUR_NAMES,
        )
    prefix = _chosen(label, prefixes, tensors)
    others = [other for other in prefixes if other != prefix]
    within = tuple(other for other in others if other.startswith(prefix))
    taken = {
        name: name.removeprefix(prefix)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
        and not name.startswith(within)
        and not _unused(name.removeprefix(prefix), tensor, wrapped=bool(prefix))
    }
    taken |= _head_beside(prefix, taken, tensors)
    left = [name for name, tensor in tensors.items() if name not in taken and tensor.dim() and name[:5] != "optim"]
    if left:
        where = f"the ViT under {_place(prefix)}" + (f" (not {', '.join(map(_place, others))})" if others else "")
        note(
            "weights file", f"{label}: {where} was taken; {len(left)} other tensors were left out ({some_names(left)})"
        )
    return {short: tensors[name] for name, short in taken.items()}


def _prefixes(tensors: Mapping[str, Tensor], anchors: Sequence[str]) -> list[str]:
    found = (name.removesuffix(anchor) for name in tensors for anchor in anchors if f".{name}".endswith(f".{anchor}"))
    # One of transformers' names ends in one of timm's, without its part "embeddings.".
    return list(dict.fromkeys(prefix for prefix in found if not prefix.endswith("embeddings.")))


def _chosen(label: str, prefixes: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Choose the prefix of the ViT to take."""
    best = min(map(_rank, prefixes))
    first, *rest = [prefix for prefix in prefixes if _rank(prefix) == best]
    for other in rest:
        if not _same(first, other, tensors):
            raise InputError(
                f"weights {label}: holds several ViTs, under {_place(first)} and {_place(other)}, and nothing says "
                "which to take; save the state dict of one alone"
            )
    return first


def _rank(prefix: str) -> int:
    """Order of choice: 0 averaged weights, 1 plain ones, 2 those that are left behind."""
    return 2 if _LAST.search(prefix) else 0 if _FIRST.search(prefix) else 1


def _same(one: str, other: str, tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the same tensors stand under both prefixes, as where a module is registered twice."""
    left, right = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (one, other)
    )
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _unused(name: str, tensor: Tensor, *, wrapped: bool) -> bool:
    """Tell whether a tensor belongs to pretraining, or counts something, rather than to a ViT."""
    counts = tensor.dim() == 0 and not tensor.is_floating_point()
    return counts or bool(_DECODER.match(name)) or (wrapped and bool(_PRETRAINING.match(name)))


def _head_beside(prefix: str, taken: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find a linear head on the ViT's features among its neighbours: names in the file -> names in the ViT."""
    if any(short.startswith(("head.", "classifier.")) for short in taken.values()):
        return {}
    token = next((tensors[name] for name in taken if name.endswith("cls_token")), None)
    parts = prefix.split(".")[:-1]
    for length in reversed(range(len(parts))):
        outer = "".join(f"{part}." for part in parts[:length])
        for name in _CLASSIFIERS:
            weight = tensors.get(f"{outer}{name}.weight")
            if weight is not None and token is not None and weight.dim() == 2 and weight.shape[1:] == token.shape[-1:]:
                ends = [end for end in ("weight", "bias") if f"{outer}{name}.{end}" in tensors]
                return {f"{outer}{name}.{end}": f"head.{end}" for end in ends}
    return {}


def _place(prefix: str) -> str:
    return shown(prefix.removesuffix(".")) if prefix else "no prefix"


def some_names(names: Sequence[str]) -> str:
    """Quote the first three names, for a sentence.

    >>> some_names(["a", "b", "c", "d"])
    "'a', 'b', 'c', …"
    """
    return ", ".join(map(shown, names[:3])) + (", …" if len(names) > 3 else "")
