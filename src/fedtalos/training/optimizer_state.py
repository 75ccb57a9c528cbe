"""State of an optimiser as named tensors, for checkpoints: taken, checked, and put back."""

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.errors import InputError, shown


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Take an optimiser's state as tensors by name.

    >>> tensors = {**model.state_dict(), **optimizer_tensors(optimizer)}
    """
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer/{index}/{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the state back that ``optimizer_tensors`` took; other tensors are ignored.

    Raises InputError where it is not such an optimiser's of these parameters.

    >>> restore_optimizer(optimizer, load_checkpoint(path).tensors)
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"optimizer/([0-9]{1,9})/(\w+)", name):
            state.setdefault(int(found[1]), {})[found[2]] = tensor
        elif name.startswith("optimizer/"):
            raise _other_optimizer(name)
    _check_state(optimizer, state)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_state(optimizer: Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Compare names, shapes and numbers of a saved state with what this optimiser keeps of each parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else {"momentum_buffer"}
    # Our sparse optimisers keep no more than moves of a parameter.
    kept: Callable[[Tensor], torch.Size] = getattr(optimizer, "kept_shape", lambda parameter: parameter.shape)
    for index, entry in state.items():
        shape = kept(parameters[index]) if index < len(parameters) else None
        for key, tensor in entry.items():
            expected = torch.Size() if key == "step" else shape
            if entry.keys() != keys or tensor.shape != expected or not tensor.is_floating_point():
                raise _other_optimizer(f"optimizer/{index}/{key}")
            if not tensor.isfinite().all() or (key in ("step", "exp_avg_sq") and bool((tensor < 0).any())):
                raise _other_optimizer(f"optimizer/{index}/{key}")


def _other_optimizer(name: str) -> InputError:
    return InputError(
        f"the checkpoint's {shown(name)} is not this optimiser's (another shape, type or number); "
        "start a run of another name"
    )
