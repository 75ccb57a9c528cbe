"""Eligible entries: the weights and biases that a mask may choose from."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fedtalos.errors import InputError
from fedtalos.models.library_model import LibraryModel
from fedtalos.models.vision_transformer import parts
from fedtalos.training.entries import Entries, Mask

Eligible = Literal["blocks", "attention", "qk", "biases", "paper"]

_IN_NAME: dict[str, str] = {"blocks": ".", "attention": ".attn.", "qk": ".attn.qkv.", "biases": ".bias", "paper": "."}
_OUTSIDE = ("patch_embed.proj.", "norm.")
"""Layers of a Vision Transformer outside the blocks that the released code of TaLoS ranks too."""


def eligible_entries(model: nn.Module, which: Eligible = "blocks") -> Entries:
    """Weights and biases of the layers inside the blocks, without the key third of each qkv bias.

    That third has a gradient of exactly zero: it shifts all logits of a softmax row alike. ``which``: blocks (all),
    attention (qkv and proj), qk (their rows of qkv), biases (those of the norms too), paper (blocks, the patch
    convolution and the norm behind the blocks: what the code released with TaLoS ranks; it also counts the key third,
    which no answer depends on). Of a model of another library only the layers that it can score count, and ``which`` is
    blocks or biases. Embeddings of positions and of the class, layer scale and the head are never eligible.

    Raises InputError for a rule that does not fit the model.

    >>> eligible = eligible_entries(model)
    >>> len(eligible), sorted(eligible.masks)[0]
    (5325312, 'blocks.0.attn.proj.bias')
    """
    shapes = eligible_shapes(model)
    if isinstance(model, LibraryModel) and (which not in ("blocks", "biases") or not shapes):
        raise InputError(
            f"eligible {which}: masks of {model.architecture} choose from blocks or biases, of its "
            f"{len(model.scorable)} linear, convolution and norm layers; give one of these, or another model"
        )
    return Entries(eligible_masks(shapes, which, next(model.parameters()).device))


def eligible_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes by name of the parameters that a rule looks at: of another library's model, those that it can score."""
    return {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if not isinstance(model, LibraryModel) or name.rpartition(".")[0] in model.scorable
    }


def eligible_masks(shapes: Mapping[str, torch.Size], which: Eligible, device: torch.device | str = "cpu") -> Mask:
    """The same entries as a mask, from nothing but the names and shapes of a model's parameters.

    >>> eligible_masks({"blocks.0.norm1.bias": torch.Size([2]), "head.bias": torch.Size([10])}, "biases")
    {'blocks.0.norm1.bias': tensor([True, True])}
    """
    if which not in _IN_NAME:
        raise InputError(f"eligible {which!r}: expected one of {', '.join(_IN_NAME)}")
    masks = {}
    for name, shape in shapes.items():
        inside = name.startswith(("blocks.", "net.")) and _IN_NAME[which] in name and not name.endswith(".gamma")
        if inside or (which == "paper" and name.startswith(_OUTSIDE)):
            masks[name] = torch.ones(shape, dtype=torch.bool, device=device)
            if len(parts(name, masks[name])) > 1 and name.endswith(".bias"):
                parts(name, masks[name])["k"].fill_(False)
            if which == "qk":
                parts(name, masks[name])["v"].fill_(False)
    return masks


def mask_of(eligible: Entries, kept: Tensor) -> Mask:
    """The mask, on the CPU, in which the ``kept`` of the eligible entries, bool (E,), may move."""
    return {name: tensor.cpu() for name, tensor in eligible.unflatten(kept).items()}
