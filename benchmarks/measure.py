"""What the benchmarks share: interleaved timing, counted work, peak memory of a fresh process, the machine, a table.

Needs only torch, numpy and what of fedtalos needs nothing else.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.entries import Entries


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, and the median over repeats of its ratio to the first call in the same repeat."""

    seconds: float
    ratio: float


def timed_ratios(calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Time calls in turns, A B C A B C ..., so that a slow spell of the machine meets all; ``warmup`` turns before."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + repeats):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    counted = {name: times[warmup:] for name, times in seconds.items()}
    first = next(iter(counted.values()))
    return {
        name: Timing(median(times), median(t / f for t, f in zip(times, first, strict=True)))
        for name, times in counted.items()
    }


def scattered(entries: Entries, count: int) -> dict[str, Tensor]:
    """``count`` of the entries, drawn alike."""
    kept = torch.zeros(len(entries), dtype=torch.bool, device=entries.device)
    kept[torch.randperm(len(entries), generator=torch_generator(0, "mask"))[:count]] = True
    return entries.unflatten(kept)


def multiply_adds(model: VisionTransformer, mask: Mapping[str, Tensor]) -> int:
    """Multiply-adds per image of a step's matrix products: convolution, linear layers, attention.

    Forward; the gradient of every layer's input behind the first tensor that moves (attention's two products have two
    such gradients each); weight gradients of the rows that hold a True. Norms, activation functions and the optimiser
    are left out.
    """
    tokens, dim = model.pos_embed.shape[1:]
    total, moves = 0, False
    for name, p in model.named_parameters():  # the order of the forward pass, but for the two embeddings
        if name.endswith("weight") and p.dim() > 1:
            positions = {"patch_embed": tokens - 1, "head": 1}.get(name.split(".")[0], tokens)
            active = int(mask[name].flatten(1).any(1).sum()) if name in mask else 0
            input_gradient = moves and not name.startswith("patch_embed")
            total += positions * p[0].numel() * (len(p) * (1 + input_gradient) + active)
        moves = moves or (name in mask and bool(mask[name].any()))
        if name.endswith("qkv.bias"):
            total += 2 * tokens**2 * dim * (1 + 2 * moves)
    return total


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int:
    """Bytes that calling ``prepare(*arguments)()`` adds to the peak of a fresh process; on CUDA, of the GPU's memory.

    ``prepare`` is a function of a module; its arguments can be pickled. What it builds itself is not counted.
    """
    # Not "spawn": on Linux ru_maxrss outlives exec, so a spawned process would start with its parent's peak.
    with get_context("forkserver").Pool(1) as pool:
        return pool.apply(_growth, (prepare, *arguments))


def environment() -> str:
    """Processor or GPU, torch's version, threads."""
    if torch.cuda.is_initialized():
        device = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
        device = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{device}, torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def synchronize() -> None:
    """Wait for what CUDA or mps, where they are in use, have yet to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def _growth(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int:
    call = prepare(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform == "linux":  # elsewhere a peak inside prepare hides as much of the call's
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    before = _max_rss()
    call()
    return _max_rss() - before


def _max_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
