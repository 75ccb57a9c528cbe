"""Kernels that a round's time goes to: what torch's profiler sees of one round, by what they do."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from measure import markdown_table, synchronize
from torch.profiler import ProfilerActivity, profile

KINDS = {  # words in a kernel's name, the first that fits
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "bmm", "matmul", "addmm", "cutlass", "nvjet", "aten::mm", "xmma"),
    "optimiser": ("adam", "sgd", "foreach", "multi_tensor"),
    "norms and softmax": ("layer_norm", "norm", "softmax"),
    "copies and casts": ("copy", "memcpy", "cat", "fill", "memset", "aten::to"),
    "fused by inductor": ("triton",),
}
LINES = 12


def kernel_table(rounds: Iterable[object], steps: int) -> str:
    """Time of kinds of kernels, and of the longest ones, in the third round: ms a step of ``steps`` in a round."""
    going = iter(rounds)
    for _ in range(2):
        next(going)
    synchronize()
    on_cuda = torch.cuda.is_initialized()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        next(going)
        synchronize()
    spent, count, kinds = defaultdict(float), defaultdict(int), defaultdict(float)
    for event in seen.key_averages():
        seconds = (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6
        spent[event.key] += seconds
        count[event.key] += event.count
        kinds[kind_of(event.key)] += seconds
    whole = sum(spent.values()) or 1.0

    def row(name: str, seconds: float, times: str) -> tuple[str, ...]:
        return name, f"{1e3 * seconds / steps:.3g}", f"{100 * seconds / whole:.1f} %", times

    rows = [row(f"all {name}", seconds, "") for name, seconds in ordered(kinds)]
    rows += [row(name[:80], seconds, f"{count[name] / steps:.0f}") for name, seconds in ordered(spent)[:LINES]]
    return markdown_table(("kernel", "ms a step", "share", "launches a step"), rows)


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    for kind, words in KINDS.items():
        if any(word in name.lower() for word in words):
            return kind
    return "others"


def ordered(seconds: dict[str, float]) -> list[tuple[str, float]]:
    """The longest first."""
    return sorted(seconds.items(), key=lambda item: -item[1])
