"""Layers of a Vision Transformer as V clients have them: one batched product for all, instead of V small ones.

A tensor that moves is stacked, (V, ...); a frozen one is shared.

Shapes: V clients, B images of a client's batch, T tokens, N rows of a layer's input by client, I and O in and out
features, D width, R rows of a tensor from the first to the last that may move.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedTensor(nn.Module):
    """A tensor (O, ...) of the model, of which each of V clients has rows of its own and all share the others.

    ``rows`` is None where nothing moves. Values are given out as ``dtype``; the frozen ones are cast at ``refresh``.

    >>> StackedTensor(torch.zeros(96, 48), slice(0, 64), size=10, dtype=torch.bfloat16)().shape
    torch.Size([10, 96, 48])
    """

    def __init__(self, tensor: Tensor, rows: slice | None, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.first, self.end = dtype, 0, 0
        self._source = tensor.detach()
        self.rows: nn.Parameter | None = None
        """The clients' own rows, (V, R, ...), in the tensor's own type."""
        if rows is not None:
            self.first, self.end = rows.start, rows.stop
            self.rows = nn.Parameter(torch.stack([self._source[rows]] * size))
        self.whole = self.end - self.first == len(tensor)
        """Every row moves."""
        self.frozen = self._source if self.whole else self._source.to(dtype)  # itself too where no cast is needed

    @property
    def own_rows(self) -> nn.Parameter:
        """Take the ``rows`` of a tensor that moves."""
        assert self.rows is not None
        return self.rows

    def refresh(self) -> None:
        """Take the frozen values from the model anew."""
        if self.frozen.data_ptr() != self._source.data_ptr():
            self.frozen.copy_(self._source)

    def forward(self) -> Tensor:
        """The tensor as V clients have it, (V, O, ...), or (O, ...) where nothing of it moves."""
        if self.rows is None:
            return self.frozen
        moving = self.rows.to(self.dtype)
        if self.whole:
            return moving
        before, after = (
            part.expand(len(moving), *part.shape) for part in (self.frozen[: self.first], self.frozen[self.end :])
        )
        return torch.cat([before, moving, after], 1)


class StackedLinear(nn.Module):
    """``nn.Linear`` of V clients, (V B, ..., I) -> (V B, ..., O); weights get gradients in their moving rows alone.

    >>> layer = StackedLinear(weight, bias, size=10)
    >>> layer(torch.rand(640, 65, 192)).shape
    torch.Size([640, 65, 576])
    """

    def __init__(self, weight: StackedTensor, bias: StackedTensor | None, size: int) -> None:
        super().__init__()
        self.weight, self.bias, self.size = weight, bias, size

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight()  # (V, O, I) or (O, I)
        bias = None if self.bias is None else self.bias()  # (V, O) or (O,)
        x = x.to(weight.dtype)
        if weight.dim() == 2 and (bias is None or bias.dim() == 1):
            return F.linear(x, weight, bias)
        by_client = x.reshape(self.size, -1, x.shape[-1])  # (V, N, I)
        row = None if bias is None else bias.unsqueeze(-2)  # (V, 1, O) or (1, O)
        if self.weight.rows is None:
            assert row is not None
            out = F.linear(by_client, weight) + row
        else:
            first, end = self.weight.first, self.weight.end
            out = _Products.apply(by_client, self.weight.rows, weight.detach(), row, first, end)  # type: ignore[no-untyped-call]
        by_sequence: Tensor = out.view(*x.shape[:-1], out.shape[-1])
        return by_sequence


class _Products(torch.autograd.Function):
    """x weight^T + row by client, (V, N, I) and (V, O, I) -> (V, N, O); the weight's gradient is that of its rows.

    autograd's own would be transposed in memory, and so be copied before an optimiser can take it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, weight: Tensor, row: Tensor | None, first: int, end: int) -> Tensor:
        for_x, for_rows, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_rows else None, weight if for_x else None)
        ctx.between, ctx.dtype = slice(first, end), rows.dtype
        return torch.bmm(x, weight.mT) if row is None else torch.baddbmm(row, x, weight.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_rows, _, for_row, *_ = ctx.needs_input_grad
        of_x = torch.bmm(gradient, weight) if for_x else None
        of_rows = torch.bmm(gradient[..., ctx.between].mT, x).to(ctx.dtype) if for_rows else None
        of_row = gradient.sum(1, keepdim=True) if for_row else None
        return of_x, of_rows, None, of_row, None, None


class StackedPatches(nn.Module):
    """The convolution of ``PatchEmbed`` as a product of patches: (V B, 3, H, W) -> (V B, D, H/p, W/p)."""

    def __init__(self, linear: StackedLinear, side: int) -> None:
        super().__init__()
        self.linear, self.side = linear, side

    def forward(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        down, right = height // self.side, width // self.side
        patches = images.view(count, channels, down, self.side, right, self.side).permute(0, 2, 4, 1, 3, 5)
        tokens = self.linear(patches.reshape(count, down * right, -1))  # (V B, N, D)
        by_place: Tensor = tokens.transpose(1, 2).unflatten(2, (down, right))
        return by_place


class StackedNorm(nn.Module):
    """``nn.LayerNorm`` of V clients, at least in float32: (V B, ..., D) -> the same."""

    def __init__(self, weight: StackedTensor, bias: StackedTensor, eps: float, size: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.size = weight, bias, eps, size

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight(), self.bias()  # (V, D) or (D,)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if weight.dim() == bias.dim() == 1:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        normalised = F.layer_norm(x, weight.shape[-1:], eps=self.eps).view(self.size, -1, weight.shape[-1])
        return torch.addcmul(bias.unsqueeze(-2), normalised, weight.unsqueeze(-2)).view(x.shape)


class StackedScale(nn.Module):
    """``LayerScale`` of V clients: (V B, T, D) -> the same."""

    def __init__(self, gamma: StackedTensor, size: int) -> None:
        super().__init__()
        self.gamma, self.size = gamma, size

    def forward(self, x: Tensor) -> Tensor:
        gamma: Tensor = self.gamma().unsqueeze(-2)  # (V, 1, D) or (1, D)
        return (x.reshape(self.size, -1, x.shape[-1]) * gamma).view(x.shape)
