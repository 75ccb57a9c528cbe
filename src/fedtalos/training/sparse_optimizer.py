"""SparseSGD and SparseAdamW: torch.optim's update rules on the True entries of each parameter, and on no others.

A frozen entry is never written, so it keeps its bits under momentum and weight decay too. State (momentum,
moments) is held for active entries only, as vectors of length A, the True entries of one parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class SparseOptimizer(Optimizer, ABC):
    """What both rules share: the masks, and taking active entries out of a parameter and putting them back."""

    def __init__(self, params: Iterable[nn.Parameter], masks: Sequence[Tensor], defaults: dict[str, Any]) -> None:
        params = list(params)
        if len(masks) != len(params):
            raise ValueError(f"masks: expected one per parameter, {len(params)}, got {len(masks)}")
        for number, (parameter, mask) in enumerate(zip(params, masks, strict=True)):
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise ValueError(
                    f"mask {number}: expected bool of shape {tuple(parameter.shape)}, "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )
        super().__init__(params, defaults)
        self._active = {  # None: every entry, taken as a view
            parameter: None if bool(mask.all()) else mask.to(parameter.device).flatten().nonzero().squeeze(1)
            for parameter, mask in zip(params, masks, strict=True)
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the active entries; parameters without a gradient are passed over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                index = self._active[parameter]
                value, gradient = parameter.view(-1), parameter.grad.reshape(-1)
                if index is None:
                    self.update(value, gradient, self.state[parameter], group)
                else:
                    active = value[index]
                    self.update(active, gradient[index], self.state[parameter], group)
                    value[index] = active
        return loss

    @abstractmethod
    def update(self, value: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move ``value`` (A,) in place by the rule."""


class SparseSGD(SparseOptimizer):
    """torch.optim.SGD (momentum, L2 weight decay) on active entries; all True, it equals torch.optim.SGD.

    Raises ValueError for masks of the wrong count, shape or dtype.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        masks: Sequence[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, masks, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def update(self, value: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            gradient = gradient.add(value, alpha=group["weight_decay"])
        if group["momentum"]:
            if "momentum_buffer" in state:
                state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
            else:
                state["momentum_buffer"] = gradient.clone()
            gradient = state["momentum_buffer"]
        value.add_(gradient, alpha=-group["lr"])


class SparseAdamW(SparseOptimizer):
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2) on active entries; all True, it equals torch.optim.AdamW.

    Raises ValueError for masks of the wrong count, shape or dtype.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        masks: Sequence[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, masks, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, value: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(value)
            state["exp_avg_sq"] = torch.zeros_like(value)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].item()
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        value.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        value.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1**step))
