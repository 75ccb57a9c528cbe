"""SparseSGD and SparseAdamW: torch.optim's update rules on the True entries of each parameter, and on no others.

A frozen entry is never written, so it keeps its bits under momentum and weight decay too. State (momentum,
moments) is held for active entries only, as vectors of length A, the True entries of one parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from fedtalos.devices import distinct_places
from fedtalos.training.entries import Entries

OptimizerName = Literal["sgd", "adamw"]

FUSED = ("cuda",)
"""Devices on which AdamW is one kernel instead of a dozen; on a CPU the update is 1 % of a step."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    entries: Entries,
    *,
    rule: OptimizerName,
    learning_rate: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Make torch.optim's optimiser where whole tensors move, its sparse twin where a mask leaves entries frozen.

    ``parameters`` by name hold what ``entries`` chooses; ``momentum`` is that of sgd.

    >>> optimizer = make_optimizer(moving.parameters, moving.entries, rule="adamw", learning_rate=1e-3)
    """
    moving = [parameters[name] for name in entries.masks]
    masks, indices = list(entries.masks.values()), list(entries.indices.values())
    if rule == "sgd":
        if entries.whole:
            return torch.optim.SGD(moving, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
        return SparseSGD(moving, masks, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, indices=indices)
    if entries.whole:
        fused = entries.device.type in FUSED
        return counting(torch.optim.AdamW(moving, lr=learning_rate, weight_decay=weight_decay, fused=fused))
    return SparseAdamW(moving, masks, lr=learning_rate, weight_decay=weight_decay, indices=indices)


def counting(optimizer: Optimizer) -> Optimizer:
    """Let every step count as a write to the parameters, by which kept features are known to be out of date.

    torch's fused kernels write without counting. A copy of the optimiser does so again.

    >>> optimizer = counting(torch.optim.AdamW(model.parameters(), fused=True))
    """

    def count(stepped: Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                increment_version(parameter)

    optimizer.register_step_post_hook(count)
    return optimizer


class SparseOptimizer(Optimizer, ABC):
    """The part that both rules share: the masks, and taking active entries out of a parameter and putting them back."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        masks: Sequence[Tensor],
        defaults: dict[str, Any],
        indices: Sequence[Tensor | None] | None,
    ) -> None:
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
        if indices is None:  # of an entry that is None, every entry, taken as a view
            indices = [
                None if bool(mask.all()) else mask.to(parameter.device).flatten().nonzero().squeeze(1)
                for parameter, mask in zip(params, masks, strict=True)
            ]
        self._active = dict(zip(params, indices, strict=True))

    def kept_shape(self, parameter: Tensor) -> torch.Size:
        """Shape of the momentum or moments that are kept of a parameter: (A,), or where all is active its own."""
        index = self._active[cast(nn.Parameter, parameter)]
        return torch.Size([parameter.numel()]) if index is None else index.shape

    def steps_only(self, indices: Iterable[Tensor | None]) -> bool:
        """Tell whether these are the entries that it steps, parameter by parameter."""
        return all(
            ours is theirs or (ours is not None and theirs is not None and torch.equal(ours, theirs))
            for ours, theirs in zip(self._active.values(), indices, strict=True)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the active entries; parameters without a gradient are passed over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            values = [self._taken(parameter, parameter.view(-1)) for parameter in moving]
            gradients = [self._taken(parameter, parameter.grad.reshape(-1)) for parameter in moving]
            if moving:
                self.update(values, gradients, [self.state[parameter] for parameter in moving], group)
            with distinct_places():
                for parameter, value in zip(moving, values, strict=True):
                    if (index := self._active[parameter]) is not None:
                        parameter.view(-1).scatter_(0, index, value)
        return loss

    def _taken(self, parameter: nn.Parameter, flat: Tensor) -> Tensor:
        """The parameter's active entries of a flat tensor, (A,): a copy, or where all are active the tensor itself."""
        index = self._active[parameter]
        # On a CPU index_select and scatter_ take a quarter of the time of flat[index].
        return flat if index is None else flat.index_select(0, index)

    @abstractmethod
    def update(
        self, values: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        """Move ``values``, one (A,) per parameter, in place by the rule; torch._foreach: one kernel for them all."""


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
        *,
        indices: Sequence[Tensor | None] | None = None,
    ) -> None:
        super().__init__(params, masks, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, indices)

    def update(
        self, values: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, values, alpha=group["weight_decay"]))
        if group["momentum"]:
            for value, state in zip(values, states, strict=True):
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(value)
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            gradients = buffers
        torch._foreach_add_(values, gradients, alpha=-group["lr"])


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
        *,
        indices: Sequence[Tensor | None] | None = None,
    ) -> None:
        super().__init__(params, masks, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, indices)

    def update(
        self, values: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        for value, state in zip(values, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(value)
                state["exp_avg_sq"] = torch.zeros_like(value)
            state["step"] += 1
        beta1, beta2 = group["betas"]
        steps = [state["step"].item() for state in states]
        means, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        deviations = torch._foreach_sqrt(squares)
        torch._foreach_div_(deviations, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(deviations, group["eps"])
        torch._foreach_addcdiv_(values, means, deviations, [-group["lr"] / (1 - beta1**step) for step in steps])
