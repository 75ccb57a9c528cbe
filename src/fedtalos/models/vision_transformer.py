"""Vision Transformer (Dosovitskiy et al., 2021), with timm's parameter names and numerics.

With DINOv2's layer scale (Touvron et al., 2021) and register tokens (Darcet et al., 2024) where the weights have them.

Shapes: B images, H W pixels, p patch side, N = (H/p)(W/p) patches, R registers, T = 1 + R + N tokens, D width, h heads,
C classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.row_sparse_linear import Linear

ModelSize = Literal["micro", "tiny", "small", "base", "large"]

WIDTH_DEPTH_HEADS: dict[str, tuple[int, int, int]] = {
    "micro": (96, 6, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@dataclass(frozen=True)
class Architecture:
    """What fixes every parameter's shape: size name, pixels a side, pixels per patch side, classes.

    ``num_classes`` is 0 of weights without a head. The last three are of what not every ViT has: register tokens, layer
    scale, and a position embedding of the class token too (DeiT III and timm's DINOv2 with registers have none).
    """

    size: str
    image_size: int
    patch_size: int
    num_classes: int
    registers: int = 0
    layer_scale: bool = False
    class_position: bool = True

    def __post_init__(self) -> None:
        if self.size not in WIDTH_DEPTH_HEADS:
            raise InputError(f"model size: expected one of {', '.join(WIDTH_DEPTH_HEADS)}, got {self.size!r}")
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise InputError(
                f"image size {self.image_size} is not a multiple of patch size {self.patch_size}: "
                "choose --image_size and --patch_size so that whole patches fill the image"
            )
        if self.num_classes < 0:
            raise InputError(f"number of classes: expected at least 0, got {self.num_classes}")

    @property
    def heads(self) -> int:
        """Attention heads of each block."""
        return WIDTH_DEPTH_HEADS[self.size][2]

    def as_dict(self) -> dict[str, str | int]:
        """Plain values, for a file's header; what has its default value is not said."""
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


class PatchEmbed(nn.Module):
    def __init__(self, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, N, D)
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    fused = True

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, T, D/h)
        fused = self.fused and not (q.device.type == "cpu" and q.dtype == torch.bfloat16)
        out = F.scaled_dot_product_attention(q, k, v) if fused else attention_by_products(q, k, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
        return mixed


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D/h)) v, (B, h, T, D/h) -> the same, in plain products, the softmax at least in float32.

    For vmap, which has no rule for the fused kernels, and for bf16 on a CPU, where the fused kernel's backward pass
    takes half of a training step.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, h, T, T)
    out: Tensor = logits.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype) @ v
    return out


@contextmanager
def without_fused_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the model's attention is plain matrix products: the fused kernels have no rule for vmap."""
    layers = [module for module in model.modules() if isinstance(module, Attention) and module.fused]
    for layer in layers:
        layer.fused = False
    try:
        yield
    finally:
        for layer in layers:
            layer.fused = True


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, *, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


def parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Views of what a parameter of that name is made of: q, k and v of our qkv layer, else itself, under no name."""
    ours = name.startswith("blocks.") and ".attn.qkv." in name
    return dict(zip("qkv", tensor.chunk(3), strict=True)) if ours else {"": tensor}


def _stage(name: str, depth: int) -> int:
    """The number of the stage that a parameter belongs to; the head comes after all of them."""
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
    """A ViT classifier; ``forward`` maps normalised images (B, 3, H, W) to logits (B, C)."""

    architecture: Architecture

    def __init__(self, architecture: Architecture, generator: torch.Generator) -> None:
        """Weights are drawn from ``generator``: truncated normal, deviation 0.02, for patches 1 / sqrt(fan in)."""
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
        """Patches as tokens, behind the class token and registers: (B, 3, H, W) -> (B, T, D)."""
        x = self.patch_embed(images)  # (B, N, D)
        class_token = self.cls_token.expand(len(x), -1, -1)
        if self.architecture.class_position:
            x = torch.cat([class_token, x], dim=1) + self.pos_embed
        else:
            x = torch.cat([class_token, x + self.pos_embed], dim=1)
        if self.reg_token is not None:
            x = torch.cat([x[:, :1], self.reg_token.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        out: Tensor = x
        return out

    def pool(self, x: Tensor) -> Tensor:
        """The normalised class token, (B, T, D) -> (B, D)."""
        out: Tensor = self.norm(x)[:, 0]
        return out

    @property
    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """The embedding, the blocks, the pooling."""
        return [self.embed, *self.blocks, self.pool]

    def frozen_stages(self, moving: Iterable[str]) -> int:
        """How many of the first stages hold none of the parameters so named."""
        depth = len(self.blocks)
        return min((_stage(name, depth) for name in moving), default=depth + 2)
