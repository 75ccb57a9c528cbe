"""Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929), with timm's parameter names and numerics.

It has DINOv2's layer scale (Touvron et al., 2021) and register tokens (Darcet et al., 2024, arXiv 2309.16588) where the
weights have them.

Shapes: B images, H W pixels, N patches, R registers, T = 1 + R + N tokens, D width, C classes.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from fedtalos.errors import InputError, shown
from fedtalos.facts import MOST_CLASSES, Word, schema
from fedtalos.models.backbone import Backbone
from fedtalos.models.transformer_layers import Block, PatchEmbed

ModelSize = Literal["micro", "tiny", "small", "base", "large"]

WIDTH_DEPTH_HEADS: dict[str, tuple[int, int, int]] = {
    "micro": (96, 6, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
"""Width D, number of blocks and heads of each size."""


@schema
@dataclass(frozen=True)
class Architecture:
    """Sizes and options that fix every parameter's shape.

    Raises InputError for an unknown size, or where whole patches do not fill the image.

    >>> str(Architecture("tiny", image_size=224, patch_size=16, num_classes=100))
    'ViT-tiny/16'
    """

    size: Word
    """Key of WIDTH_DEPTH_HEADS."""
    image_size: Annotated[int, Interval(ge=1, le=2**14)]
    """Pixels a side of the image."""
    patch_size: Annotated[int, Interval(ge=1, le=2**14)]
    """Pixels a side of a patch."""
    num_classes: Annotated[int, Interval(ge=0, le=MOST_CLASSES)]
    """C; 0 for weights without a head."""
    registers: Annotated[int, Interval(ge=0, le=1024)] = 0
    """R, tokens beside the class token that serve as memory."""
    layer_scale: bool = False
    class_position: bool = True
    """True: the class token has a position embedding too (DeiT III and timm's DINOv2 with registers have none)."""

    def __post_init__(self) -> None:
        if self.size not in WIDTH_DEPTH_HEADS:
            raise InputError(f"size {shown(self.size)}: expected one of {', '.join(WIDTH_DEPTH_HEADS)}")
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise InputError(
                f"image size {self.image_size} is not a multiple of patch size {self.patch_size}: "
                "choose image_size and patch_size so that whole patches fill the image"
            )
        if self.num_classes < 0:
            raise InputError(f"num_classes {self.num_classes}: expected at least 0")

    @property
    def heads(self) -> int:
        """Attention heads of each block."""
        return WIDTH_DEPTH_HEADS[self.size][2]

    def as_dict(self) -> dict[str, str | int]:
        """Give plain values for a file's header, without those that are the default."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def __str__(self) -> str:
        parts = {
            f"{self.registers} registers": self.registers,
            "layer scale": self.layer_scale,
            "no class position": not self.class_position,
        }
        beside = " and ".join(part for part, there in parts.items() if there)
        return f"ViT-{self.size}/{self.patch_size}" + (f" with {beside}" if beside else "")


def parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Divide a parameter into views of its parts: q, k and v for a qkv layer, else itself under an empty name.

    >>> list(parts("blocks.0.attn.qkv.bias", torch.zeros(288)))
    ['q', 'k', 'v']
    """
    ours = name.startswith("blocks.") and ".attn.qkv." in name
    return dict(zip("qkv", tensor.chunk(3), strict=True)) if ours else {"": tensor}


def _stage(name: str, depth: int) -> int:
    """Find the number of the stage that a parameter belongs to; the head comes after all of them."""
    part, *rest = name.split(".")
    match part:
        case "blocks":
            return 1 + int(rest[0])
        case "norm":
            return depth + 1
        case "head":
            return depth + 2
        case _:
            return 0


class VisionTransformer(Backbone):
    """Vision Transformer classifier: normalised images (B, 3, H, W) -> logits (B, C).

    >>> model = VisionTransformer(Architecture("micro", 32, 4, num_classes=10), torch_generator(0, "weights"))
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    architecture: Architecture

    def __init__(self, architecture: Architecture, generator: torch.Generator) -> None:
        """Draw weights from ``generator``: truncated normal, deviation 0.02, for patches 1 / sqrt(fan in)."""
        super().__init__()
        self.architecture = architecture
        dim, depth, heads = WIDTH_DEPTH_HEADS[architecture.size]
        self.patch_embed = PatchEmbed(architecture.image_size, architecture.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.reg_token = nn.Parameter(torch.zeros(1, architecture.registers, dim)) if architecture.registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.grid**2 + architecture.class_position, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, layer_scale=architecture.layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, architecture.num_classes)
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6, generator=generator)
        fan_in = self.patch_embed.proj.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=math.sqrt(1 / fan_in), generator=generator)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        for module in (*self.blocks.modules(), self.head):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Turn images into tokens, class token first, then registers, then patches: (B, 3, H, W) -> (B, T, D)."""
        x = self.patch_embed(images)  # (B, N, D)
        class_token = self.cls_token.expand(x.shape[0], -1, -1)
        if self.architecture.class_position:
            x = torch.cat([class_token, x], dim=1) + self.pos_embed
        else:
            x = torch.cat([class_token, x + self.pos_embed], dim=1)
        if self.reg_token is not None:
            x = torch.cat([x[:, :1], self.reg_token.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        out: Tensor = x
        return out

    def pool(self, x: Tensor) -> Tensor:
        """Take the class token, normalised: (B, T, D) -> (B, D)."""
        out: Tensor = self.norm(x)[:, 0]
        return out

    @property
    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """The embedding, each block, the pooling."""
        return [self.embed, *self.blocks, self.pool]

    def frozen_stages(self, moving: Iterable[str]) -> int:
        """Count the first stages that hold none of the parameters so named."""
        depth = len(self.blocks)
        return min((_stage(name, depth) for name in moving), default=depth + 2)
