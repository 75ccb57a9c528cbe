"""A classification head by itself: on the model, and in a file."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedtalos.errors import InputError
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.models.backbone import Backbone

HEADS = ("weights", "random", "ridge", "ncm", "linear")  # what --head takes beside auto and a file


def set_head(model: Backbone, weight: Tensor, bias: Tensor) -> None:
    """Put weight (C, D) and bias (C,) into the model's head."""
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)


def save_head(path: Path, model: Backbone) -> None:
    """Write the model's head to a file that --head takes, sealed."""
    tensors = {f"head.{name}": tensor.detach().cpu() for name, tensor in model.head.named_parameters()}
    write_atomic(path, sealed(save_safetensors(tensors, {"seal": UNSEALED})))


def read_head(path: Path, model: Backbone) -> tuple[Tensor, Tensor]:
    """weight (C, D) and bias (C,) of a head file; InputError where it is missing, changed or does not fit."""
    try:
        content = path.read_bytes()
        tensors = load_safetensors(content)
        weight, bias = tensors["head.weight"], tensors["head.bias"]
    except OSError as error:
        raise InputError(
            f"--head {path}: cannot be read ({error.strerror}); give {', '.join(HEADS)} or a head file"
        ) from error
    except (SafetensorError, KeyError) as error:
        raise InputError(f"--head {path}: not a head file; `fedtalos editing` writes one beside its mask") from error
    if not is_sealed(content):
        raise InputError(f"--head {path}: not what was written (checksum), or of another version; make it anew")
    if weight.shape != model.head.weight.shape or bias.shape != model.head.bias.shape:
        raise InputError(
            f"--head {path}: weight {tuple(weight.shape)}, but this model and data set need "
            f"{tuple(model.head.weight.shape)} (classes, width)"
        )
    if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in (weight, bias)):
        raise InputError(f"--head {path}: holds other than finite numbers; give a head of a run that did not diverge")
    return weight, bias
