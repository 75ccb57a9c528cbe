"""Pretrained weights: found on the hub or in a file, read, checked and described."""

from dataclasses import dataclass

from torch import Tensor

from fedtalos.models.library_model import LibraryArchitecture
from fedtalos.models.vision_transformer import Architecture
from fedtalos.models.weights.pixels import Channels, Interpolation


@dataclass(frozen=True)
class Weights:
    """Parameters by name, float32 on the CPU, and what their shapes and their makers say of them.

    Names are timm's for a plain ViT, and the library's own after ``net.`` for a library model.

    >>> weights = load_weights("pretrained", "tiny")
    >>> print(weights.architecture, weights.architecture.image_size, weights.mean)
    ViT-tiny/16 224 (0.5, 0.5, 0.5)
    """

    tensors: dict[str, Tensor]
    architecture: Architecture | LibraryArchitecture
    mean: Channels
    """Mean by channel of the pixels (in 0..1) that they were trained on."""
    std: Channels
    """Standard deviation of these pixels."""
    source: str
    """hub:OWNER/REPO@REVISION, a file's name, or a checkpoint's path."""
    sha256: str
    """Checksum of the file."""
    classes: tuple[str, ...] | None = None
    """Names of the head's classes, where they are known (in our checkpoints)."""
    interpolation: Interpolation = "bilinear"
    """Resizing of images where their makers evaluated them."""
    crop: float = 1.0
    """Share of each side that their middle crop kept, 0 to 1."""
