"""Models with weights: built to fit them, loaded, and given their pixel statistics and origin.

Letters: D width, g patches a side; 1 + g² position embeddings, the class token's first, or g² where it has none.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone, Origin
from fedtalos.models.library_model import LibraryArchitecture, LibraryModel
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights import Weights
from fedtalos.models.weights.pixels import Interpolation
from fedtalos.notes import note
from fedtalos.randomness import torch_generator

Resize = Literal["weights", "plain"]
"""Resizing of images: as the weights' makers did where they evaluated them, or bilinearly and whole."""


def build_model(architecture: Architecture | LibraryArchitecture, seed: int = 0) -> Backbone:
    """Make a model whose weights are drawn from ``seed``.

    >>> model = build_model(Architecture("micro", image_size=8, patch_size=4, num_classes=10))
    """
    generator = torch_generator(seed, "weights")
    if isinstance(architecture, LibraryArchitecture):
        return LibraryModel(architecture, generator)
    model = VisionTransformer(architecture, generator)
    # The draws come in the order of the tensors, so their sizes count too.
    size = f"{architecture.size}/{architecture.patch_size} at {architecture.image_size} px"
    model.origin = Origin("none", f"none, seed {seed}, {size}")
    return model


def model_with_weights(
    weights: Weights,
    classes: tuple[str, ...],
    *,
    image_size: int | None = None,
    seed: int = 0,
    head: str = "auto",
    resize: Resize = "weights",
) -> Backbone:
    """Make a model of these weights for these classes.

    ``image_size`` (pixels a side) is that of the weights where it is None. With ``head`` "weights" the model takes the
    weights' own head. With "auto" it does so only where the head's classes are known to be these, since a count alone
    says little. Else the head is drawn from ``seed`` and the weights' checksum, to be replaced or trained: the seed
    alone could give the very head that the weights were trained from. Images are resized and
    cropped as the weights' makers did, or with ``resize`` "plain" bilinearly and whole; a checkpoint of ours keeps its
    own way.

    Raises InputError where head "weights" is asked for and does not fit.

    >>> model = model_with_weights(load_weights("pretrained", "tiny"), data.classes, image_size=96)
    """
    size = image_size or weights.architecture.image_size
    model = build_model(replace(weights.architecture, image_size=size, num_classes=len(classes)), seed)
    fits = not load_into(model, weights) and weights.classes in (None, classes)
    if head == "weights" and not fits:
        raise InputError("head weights: they hold no head for these classes; use random, ridge, ncm, linear or a file")
    if fits and (head == "weights" or (head == "auto" and weights.classes is not None)):
        model.head_source = "weights"
    else:
        with torch.no_grad():
            nn.init.trunc_normal_(
                model.head.weight, std=0.02, generator=torch_generator(seed, "new head", weights.sha256)
            )
            nn.init.zeros_(model.head.bias)
    model.mean, model.std = weights.mean, weights.std
    model.interpolation, model.crop = resizing_of(weights, resize)
    _note_resizing(model, weights)
    model.origin = Origin(weights.source, weights.sha256)
    return model


def resizing_of(weights: Weights, resize: Resize = "weights") -> tuple[Interpolation, float]:
    """Tell how a model of these weights has images resized, and which share of each side it sees.

    That is the weights' own way, unless "plain" is asked for; our checkpoints keep the way that they were trained in.

    >>> resizing_of(load_weights("pretrained", "tiny"))
    ('bicubic', 0.9)
    """
    own = resize == "weights" or weights.classes is not None
    return (weights.interpolation, weights.crop) if own else ("bilinear", 1.0)


def _note_resizing(model: Backbone, weights: Weights) -> None:
    if (weights.interpolation, weights.crop) != ("bilinear", 1.0):
        ours, theirs = (f"{one.interpolation}, the middle {one.crop:.3g} of each side" for one in (model, weights))
        note("resize", f"images are resized {ours}" + ("" if ours == theirs else f"; the weights' makers: {theirs}"))


def load_into(model: Backbone, weights: Weights) -> list[str]:
    """Copy the weights into the model and return the names that keep their initial value: none, or the head's two.

    A ViT's position embedding is resampled to the model's grid. The head is loaded where the class counts agree.

    Raises InputError, with the model untouched, where size, patch size, names or shapes differ.

    >>> load_into(model, load_weights("pretrained", "tiny"))
    ['head.weight', 'head.bias']
    """
    ours, theirs = model.architecture, weights.architecture
    if str(ours) != str(theirs):
        raise InputError(
            f"weights {weights.source}: expected a {ours}, got a {theirs}; "
            "give model_size and patch_size of the weights, or weights none"
        )
    new_head = ["head.weight", "head.bias"] if theirs.num_classes != ours.num_classes else []
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in new_head}
    if isinstance(model, VisionTransformer):
        grid, prefix = model.patch_embed.grid, int(model.architecture.class_position)
        tensors["pos_embed"] = resample_position_embedding(tensors["pos_embed"], grid, prefix=prefix)
    parameters = {name: p for name, p in model.named_parameters() if name not in new_head}
    _check_names_and_shapes(weights.source, parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return new_head


def resample_position_embedding(pos_embed: Tensor, grid: int, *, prefix: int = 1) -> Tensor:
    """Resample a position embedding to another image size: (1, prefix + g², D) -> (1, prefix + grid², D).

    The first ``prefix`` positions (the class token's) are kept. Those of the patches are interpolated bicubically with
    antialiasing, as timm's ``resample_abs_pos_embed`` does.

    >>> resample_position_embedding(torch.zeros(1, 1 + 14**2, 192), grid=6).shape
    torch.Size([1, 37, 192])
    """
    old = math.isqrt(pos_embed.shape[1] - prefix)
    if old == grid:
        return pos_embed
    kept, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    square = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([kept, square.flatten(2).transpose(1, 2)], dim=1)


def _check_names_and_shapes(label: str, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in parameters if name not in tensors]
    unexpected = [name for name in tensors if name not in parameters]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise InputError(
            f"weights {label}: expected the {len(parameters)} tensors of this model in timm's names, but "
            f"{'; '.join(faults)}; give weights of a plain ViT, or weights none"
        )
