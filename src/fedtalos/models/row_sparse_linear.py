"""Row-sparse linear layer: its weight's gradient costs only the rows that may move.

Shapes: N rows of the input (all leading dimensions flattened), I in and O out features, R active rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = Tensor | slice | None
"""Rows of a weight (O, I): their numbers, int64 (R,) on its device; one range; or None for all."""


class Linear(nn.Linear):
    """``nn.Linear``, (..., I) -> (..., O), that computes its weight's gradient in some rows only; elsewhere it is 0.

    Outputs, and the gradients of input and bias, are those of ``nn.Linear``.

    >>> layer = Linear(192, 768)
    >>> layer.active_rows = slice(0, 64)
    """

    active_rows: Rows = None
    """Rows whose gradient is computed; None: all, by ``nn.Linear`` itself."""

    def forward(self, x: Tensor) -> Tensor:
        if self.active_rows is None:
            return super().forward(x)
        inputs: tuple[Tensor | None, ...] = (x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):  # cast out here: gradients come back in the parameters' own type
            dtype = torch.get_autocast_dtype(x.device.type)
            inputs = tuple(tensor if tensor is None else tensor.to(dtype) for tensor in inputs)
        out: Tensor = _RowSparseLinear.apply(*inputs, self.active_rows)  # type: ignore[no-untyped-call]
        return out


class _RowSparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, _rows: Tensor | slice) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        x, weight, _, rows = inputs
        for_x, for_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.rows, ctx.shape = rows, weight.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        flat, rows = gradient.reshape(-1, ctx.shape[0]), ctx.rows  # (N, O)
        of_weight = None
        if for_weight:
            picked = flat[:, rows] if isinstance(rows, slice) else flat.index_select(1, rows)  # (N, R)
            of_weight = flat.new_zeros(ctx.shape)
            of_weight[rows] = picked.T @ x.reshape(-1, ctx.shape[1])
        return gradient @ weight if for_x else None, of_weight, flat.sum(0) if for_bias else None, None


def rows_with_true(mask: Tensor) -> Rows:
    """Find the rows of a bool mask (O, I) that hold a True, for ``active_rows``; there must be at least one.

    Where they fill most of the range from first to last, the whole range is given: picking rows costs more than leaving
    a few out saves.

    >>> rows_with_true(torch.tensor([[False], [True], [True], [False]]))
    slice(1, 3, None)
    """
    rows = mask.any(1).nonzero().squeeze(1)
    first, last = int(rows[0]), int(rows[-1])
    if len(rows) < 0.75 * (last + 1 - first):
        return rows
    return None if last + 1 - first == len(mask) else slice(first, last + 1)
