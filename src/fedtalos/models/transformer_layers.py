"""Layers of a Vision Transformer: patch embedding, attention, MLP, layer scale, block.

Shapes: B images, H W pixels, p patch side, N = (H/p)(W/p) patches, T tokens, D width, h heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtalos.models.row_sparse_linear import Linear


class PatchEmbed(nn.Module):
    """Patches of an image, each mapped to a token: (B, 3, H, W) -> (B, N, D).

    >>> PatchEmbed(image_size=32, patch_size=4, dim=96)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 64, 96])
    """

    def __init__(self, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        """Patches a side."""
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, D) -> (B, T, D).

    >>> Attention(dim=96, heads=3)(torch.rand(2, 65, 96)).shape
    torch.Size([2, 65, 96])
    """

    fused = True
    """False: plain matrix products instead of torch's fused kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, T, D/h)
        fused = self.fused and not (q.device.type == "cpu" and q.dtype == torch.bfloat16)
        out = F.scaled_dot_product_attention(q, k, v) if fused else attention_by_products(q, k, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
        return mixed


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(D/h)) v by plain products: three of (B, h, T, D/h) -> (B, h, T, D/h).

    The softmax is at least in float32. This serves bf16 on a CPU, where the fused kernel's backward pass takes half of
    a training step.

    >>> attention_by_products(*torch.rand(3, 2, 3, 65, 32)).shape
    torch.Size([2, 3, 65, 32])
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, h, T, T)
    out: Tensor = logits.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype) @ v
    return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: (B, T, D) -> (B, T, D).

    >>> Mlp(dim=96)(torch.rand(2, 65, 96)).shape
    torch.Size([2, 65, 96])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., 2021, arXiv 2103.17239): (B, T, D) -> (B, T, D).

    >>> LayerScale(dim=96)(torch.rand(2, 65, 96)).shape
    torch.Size([2, 65, 96])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block, attention then MLP, each beside a skip connection: (B, T, D) -> (B, T, D).

    >>> Block(dim=96, heads=3, layer_scale=False)(torch.rand(2, 65, 96)).shape
    torch.Size([2, 65, 96])
    """

    def __init__(self, dim: int, heads: int, *, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out
