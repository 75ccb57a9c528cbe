"""What every model here is: stages that turn images into features, and one linear head on them.

Shapes: B images, H W pixels, D width of the features, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor, nn


class Facts(Protocol):
    """What fixes every parameter's shape; `str` of it is what people call the model."""

    @property
    def image_size(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def heads(self) -> int:
        """Attention heads of each block; 0 where nobody knows."""
        ...

    def as_dict(self) -> dict[str, str | int]:
        """Plain values, for a file's header."""
        ...


class Backbone(nn.Module, ABC):
    """A classifier of normalised images (B, 3, H, W); its parameters are all that it learns (no buffers)."""

    architecture: Facts
    head: nn.Linear

    @property
    @abstractmethod
    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """What an image passes through before the head; the last gives features (B, D)."""

    @abstractmethod
    def frozen_stages(self, moving: Iterable[str]) -> int:
        """How many of the first stages hold none of the parameters so named."""

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (B, 3, H, W) -> (B, D)."""
        return self.run(images, 0, len(self.stages))

    def run(self, x: Tensor, first: int, end: int) -> Tensor:
        """Stages first to end - 1, of what the stage before the first gave."""
        for stage in self.stages[first:end]:
            x = stage(x)
        return x

    def forward(self, x: Tensor, passed: int = 0) -> Tensor:
        """Logits (B, C) of images, or of what they were after the first ``passed`` stages."""
        logits: Tensor = self.head(self.run(x, passed, len(self.stages)))
        return logits
