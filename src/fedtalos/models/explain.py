"""Explanations: which patches of an image a Vision Transformer's answer hangs on.

Shapes: B images, H W pixels a side, h heads, T tokens (class token, registers, then g² patches), D width, C classes.
"""

from typing import Any

import torch
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.transformer_layers import Attention
from fedtalos.models.vision_transformer import VisionTransformer


@torch.no_grad()
def attention_rollout(model: Backbone, images: Tensor) -> Tensor:
    """Follow attention from the class token back to the patches: normalised images (B, 3, H, W) -> shares (B, g, g).

    Each block's attention, averaged over its heads, counts half and the skip connection beside it the other half; the
    blocks' matrices are multiplied. It shows where the model looked, whatever it answered. Source: Abnar and Zuidema,
    2020, Quantifying attention flow in transformers, arXiv 2005.00928, equation 1.

    Raises InputError for models of other libraries.

    >>> attention_rollout(model, images).shape
    torch.Size([8, 14, 14])
    """
    vit = _vit(model)
    kept: list[Tensor] = []
    layers = [layer for layer in vit.modules() if isinstance(layer, Attention)]
    handles = [layer.register_forward_hook(_keeper(kept)) for layer in layers]
    try:
        vit.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    rolled = torch.eye(kept[0].shape[-1], device=images.device).expand(len(images), -1, -1)
    for attention in kept:
        mixed = 0.5 * attention + 0.5 * torch.eye(attention.shape[-1], device=images.device)  # rows add up to 1
        rolled = mixed @ rolled
    return _of_patches(vit, rolled[:, 0])


def grad_cam(model: Backbone, images: Tensor, classes: Tensor) -> Tensor:
    """Weigh patches by what raises a class's logit: images (B, 3, H, W), classes int64 (B,) -> (B, g, g), 0 and above.

    Features are the tokens that enter the last block's attention, normalised: past it, a patch no longer reaches the
    class token, and its gradient is 0. Each feature's weight is its gradient, averaged over the patches. Source:
    Selvaraju et al., 2017, Grad-CAM, arXiv 1610.02391, equations 1 and 2.

    Raises InputError for models of other libraries.

    >>> grad_cam(model, images, model(images).argmax(1)).shape
    torch.Size([8, 14, 14])
    """
    vit = _vit(model).eval()
    with torch.no_grad():
        before = vit.run(images, 0, len(vit.blocks))  # embedding, and all blocks but the last
    with torch.enable_grad():
        last: Any = vit.blocks[-1]
        features = last.norm1(before).detach().requires_grad_()
        after = before + last.ls1(last.attn(features))
        after = after + last.ls2(last.mlp(last.norm2(after)))
        logits = vit.head(vit.pool(after))
        chosen = logits.gather(1, classes.view(-1, 1)).sum()
        (gradient,) = torch.autograd.grad(chosen, features)
    prefix = 1 + vit.architecture.registers
    weights = gradient[:, prefix:].mean(1, keepdim=True)  # (B, 1, D)
    return _of_patches(vit, (weights * features.detach()).sum(-1).relu())


def _vit(model: Backbone) -> VisionTransformer:
    if not isinstance(model, VisionTransformer):
        raise InputError(
            f"explain: {model.architecture} is another library's; a ViT of ours is needed, whose inside is known"
        )
    return model


def _keeper(kept: list[Tensor]) -> Any:
    """Make a forward hook that keeps a layer's attention (B, T, T), averaged over heads."""

    def keep(layer: Attention, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        (x,) = inputs
        batch, tokens, dim = x.shape
        qkv = layer.qkv(x).view(batch, tokens, 3, layer.heads, dim // layer.heads)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, T, D/h)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        kept.append(logits.float().softmax(-1).mean(1))

    return keep


def _of_patches(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """Put the patches' values among (B, T) on their grid, (B, g, g)."""
    grid = vit.patch_embed.grid
    return tokens[:, 1 + vit.architecture.registers :].reshape(-1, grid, grid)
