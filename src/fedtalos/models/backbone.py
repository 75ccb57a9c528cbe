"""Backbones: the interface of every model here, stages that give features and one linear head on them.

Shapes: B images, H W pixels a side, D width of the features, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn


class Facts(Protocol):
    """Values that fix every parameter's shape; ``str`` gives the model's usual name.

    >>> print(model.architecture, model.architecture.image_size)
    ViT-tiny/16 224
    """

    @property
    def image_size(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def heads(self) -> int:
        """Attention heads of each block; 0 where that is not known."""
        ...

    def as_dict(self) -> dict[str, str | int]:
        """Give plain values for a file's header."""
        ...


@dataclass(frozen=True)
class Origin:
    """Source of a model's weights.

    >>> Origin("hub:timm/vit_small_patch16_224.dino@main", fingerprint="3f1c...").source
    'hub:timm/vit_small_patch16_224.dino@main'
    """

    source: str = "none"
    """A name for people: a file's, or the hub's with its revision."""
    fingerprint: str = "none"
    """A checksum; equal for equal weights."""


class Backbone(nn.Module, ABC):
    """A classifier of normalised images (B, 3, H, W); its parameters are all that it learns (no buffers).

    >>> model = build_model(Architecture("tiny", 224, 16, num_classes=100))
    >>> model.features(images).shape, model(images).shape
    (torch.Size([8, 192]), torch.Size([8, 100]))
    """

    architecture: Facts
    head: nn.Linear
    """The last layer, (B, D) -> (B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
        """Mean by channel of the pixels (in 0..1) that the weights were trained on."""
        self.std: tuple[float, float, float] = (0.5, 0.5, 0.5)
        """Standard deviation of these pixels."""
        self.interpolation: Literal["bilinear", "bicubic"] = "bilinear"
        """Resizing of images for this model."""
        self.crop = 1.0
        """Share of each side of an image that a middle crop keeps for it, 0 to 1."""
        self.stored_size: int | None = None
        """Pixels a side of the images that it was trained on, before they were resized for it; None: as resized."""
        self.origin = Origin()
        self.head_source = "random"
        """Source of the head: random, weights, ridge, ncm, linear, file or trained."""

    @property
    @abstractmethod
    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """The functions that an image passes through before the head, in order; the last gives features (B, D)."""

    @abstractmethod
    def frozen_stages(self, moving: Iterable[str]) -> int:
        """Count the first stages that hold none of the parameters so named."""

    def features(self, images: Tensor) -> Tensor:
        """Compute the head's input, (B, 3, H, W) -> (B, D)."""
        return self.run(images, 0, len(self.stages))

    def run(self, x: Tensor, first: int, end: int) -> Tensor:
        """Run stages first to end - 1 on the output of the stage before them."""
        for stage in self.stages[first:end]:
            x = stage(x)
        return x

    def forward(self, x: Tensor, passed: int = 0) -> Tensor:
        """Compute logits (B, C) from images, or from their state after the first ``passed`` stages."""
        logits: Tensor = self.head(self.run(x, passed, len(self.stages)))
        return logits
