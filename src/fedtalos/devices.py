"""Which device a run computes on, and in which precision."""

import time
from functools import cache

import psutil
import torch

from fedtalos.errors import InputError
from fedtalos.training.loop import Precision, autocast


def choose_device(name: str) -> torch.device:
    """The device asked for; auto takes mps, then cuda, then cpu. InputError where it is not there.

    On CUDA, matrix products of float32 tensors take TF32 from then on, as torch's convolutions do by default: inputs
    rounded to 10 bits of mantissa (a relative error of 5e-4), sums in float32, several times faster. That is so for
    ``--precision fp32``, and for what stays float32 beside bf16, Fisher scores among it.
    """
    there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        others = ", ".join(device for device, is_there in there.items() if is_there)
        raise InputError(f"--device {name}: not available here; available: {others} (or leave it out)")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> Precision:
    """auto: bf16 where its matrix products take at most two thirds of fp32's time here, measured; fp32 elsewhere."""
    try:
        with autocast(device, "fp32" if name == "fp32" else "bf16"):
            pass
        if name == "auto":
            return "bf16" if bf16_speedup(device) >= 1.5 else "fp32"
    except RuntimeError as error:
        if name == "auto":
            return "fp32"
        raise InputError(f"--precision {name}: not supported on {device.type}; use fp32") from error
    return "bf16" if name == "bf16" else "fp32"


@cache
def bf16_speedup(device: torch.device) -> float:
    """Time of a matrix product of ViT-S's size in fp32 over bf16's, the best of three each; milliseconds to measure."""
    tokens, width = (16_384, 1536) if device.type == "cuda" else (256, 384)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(shape, device=device, dtype=dtype) for shape in ((tokens, 384), (384, width)))
        seconds[dtype] = min(_seconds_of_product(left, right) for _ in range(4))  # the first one sets the kernel up
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    start = time.perf_counter()
    (left @ right)[0, 0].item()  # waits for the device
    return time.perf_counter() - start


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has (of mps: that it advises to use)."""
    match device.type:
        case "cuda":
            return int(torch.cuda.get_device_properties(device).total_memory)
        case "mps":
            return int(torch.mps.recommended_max_memory())
        case _:
            return int(psutil.virtual_memory().total)
