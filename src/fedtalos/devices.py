"""Devices and arithmetic: where a run computes, in which precision, and how much memory there is."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from fedtalos.errors import InputError, check_word

Precision = Literal["fp32", "bf16"]

# torch reads it at the first product of a process on CUDA, and never again.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

AMPERE = (8, 0)
"""Compute capability of the first NVIDIA cards whose tensor cores multiply bfloat16."""


def choose_device(name: str = "auto") -> torch.device:
    """Find the device asked for; auto takes mps, then cuda, then cpu.

    On CUDA, matrix products of float32 tensors take TF32 from then on, as torch's convolutions do by default: inputs
    rounded to 10 bits of mantissa (a relative error of 5e-4), sums in float32, several times faster. That holds for
    training in precision fp32, and for what stays float32 beside bf16; scores are taken under ``strict_float32``. Sums
    are added in one order (``same_numbers_on_cuda``).

    Raises InputError where the device is not there.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    if not there.get(name):
        others = ", ".join(device for device, is_there in there.items() if is_there)
        raise InputError(f"device {name}: not available here; available: {others} (or leave it out)")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
        same_numbers_on_cuda()
    return torch.device(name)


def same_numbers_on_cuda(*, strict: bool = True) -> None:
    """Let CUDA add in one order, so that two runs of one seed on one card are equal to the bit.

    torch takes its deterministic algorithms from then on, and cuBLAS a workspace of fixed size, which is set when this
    module is imported: a process that multiplied on CUDA before that gets RuntimeError from every product. With
    ``strict`` so does an operation that has no such algorithm; our models have none. Without, which is for models of
    other libraries, torch warns, and attention's backward pass is not fixed either.

    >>> same_numbers_on_cuda()
    """
    # torch.use_deterministic_algorithms would import inductor, which takes 2 s; ``compiled`` calls it where needed.
    torch.set_deterministic_debug_mode("error" if strict else "warn")
    debugging: Any = torch.utils.deterministic
    debugging.fill_uninitialized_memory = False  # a kernel for every new tensor


def choose_precision(name: str, device: torch.device) -> Precision:
    """Settle a precision; auto is bf16 on CUDA cards that multiply bfloat16 (Ampere and later), fp32 elsewhere.

    The choice depends on what the device is, never on how fast it was: two runs of one seed compute the same.

    Raises InputError where the device does not support the precision asked for.

    >>> choose_precision("auto", torch.device("cpu"))
    'fp32'
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE else "fp32"
    if name != "bf16":
        return "fp32"
    try:
        with autocast(device, "bf16"):
            pass
    except RuntimeError as error:
        raise InputError(f"precision {name}: not supported on {device.type}; use fp32") from error
    return "bf16"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Compute forward passes in mixed precision: bf16 products, float32 weights, gradients and sums.

    Raises InputError for an unknown precision.
    """
    if precision not in ("fp32", "bf16"):  # torch.compile comes by here
        check_word("precision", precision, Precision)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def distinct_places() -> Iterator[None]:
    """Write inside to places that all differ: their order does not matter, so torch need not sort them first.

    Its deterministic kernels do, which takes many times as long as the write.

    >>> with distinct_places():
    ...     flat.scatter_(0, index, values)
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def strict_float32() -> Iterator[None]:
    """Multiply float32 tensors in float32 inside: no TF32 on CUDA, no bfloat16 on CPUs, whatever was chosen before.

    What was chosen is there again afterwards. Autocast is another matter: ``autocast(device, "fp32")`` turns it off.

    >>> with strict_float32():
    ...     logits = model(images)
    """
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # torch before 2.9
        products, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)
            backends.cudnn.allow_tf32 = convolutions
        return
    switches = [getattr(getattr(backends, name), kind) for name, kind in _PRODUCTS]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    # torch keeps products under an older name too, and refuses to multiply, or to compile, where the two differ.
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        for switch, chosen in zip(switches, before, strict=True):
            switch.fp32_precision = chosen


_PRODUCTS = (("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
"""Places where torch keeps how float32 is multiplied: cuBLAS, cuDNN and, on CPUs, oneDNN."""


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has (on mps: that it advises to use)."""
    match device.type:
        case "cuda":
            return int(torch.cuda.get_device_properties(device).total_memory)
        case "mps":
            return int(torch.mps.recommended_max_memory())
        case _:
            import psutil  # only here, so that benchmarks on a GPU do without it

            return int(psutil.virtual_memory().total)


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether a device's memory ran out: CUDA has a type for it, MPS a message."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)
