"""How much cheaper a training step is when a mask says what may move: time and memory against dense AdamW.

    python benchmarks/masked_step.py --weights FILE --mask FILE --image_size 224

One run, variants in turns. A step is forward, backward, clipping and update, by fedtalos' own ``train``. The floor is
the ratio of multiply-adds that matrix products alone would allow (``multiply_adds``). Peak memory is what two steps
add to a process that holds model, images, masks and their indices; optimiser state and gradients are part of it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from measure import environment, markdown_table, multiply_adds, peak_memory, scattered, timed_ratios
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.models.load import load_into
from fedtalos.models.vision_transformer import Architecture, ModelSize, VisionTransformer
from fedtalos.models.weights.read import Weights, load_weights
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.entries import Entries, Mask
from fedtalos.training.loop import train
from fedtalos.training.masked_parameters import MaskedParameters, head_mask
from fedtalos.training.sparse_optimizer import make_optimizer

CLASSES = 100


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    model_size: ModelSize = "tiny"
    image_size: int = 96
    """pixels a side"""
    patch_size: int = 16
    """pixels a patch side"""
    batch_size: int = 64
    weights: str | None = None
    """a weights FILE or name, as --weights of fedtalos; else random weights"""
    mask: Path | None = None
    """a mask FILE to measure too"""
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = torch.get_num_threads()
    repeats: int = 7
    output: Path | None = None
    """also write the table here"""


def build(options: Options, weights: Weights | None = None) -> VisionTransformer:
    architecture = Architecture(options.model_size, options.image_size, options.patch_size, CLASSES)
    model = VisionTransformer(architecture, torch_generator(0, "weights"))
    if weights is not None:
        load_into(model, weights)
    return model.to(options.device)


def variants(model: VisionTransformer, mask_file: Path | None) -> dict[str, Mask]:
    """What may move, by name; sparsity is the share of all eligible entries that stay frozen."""
    whole = {name: torch.ones_like(p, dtype=torch.bool, requires_grad=False) for name, p in model.named_parameters()}
    blocks, qk = eligible_entries(model), eligible_entries(model, "qk")
    upper = [f"blocks.{number}." for number in range(len(model.blocks) // 2, len(model.blocks))]
    chosen: dict[str, Mask] = {"dense": whole, "head": head_mask(model)}
    for percent in (90, 99):
        count = round((100 - percent) / 100 * len(blocks))
        chosen[f"q and k, scattered entries, {percent} %"] = scattered(qk, count)
        chosen[f"q and k, whole rows, {percent} %"] = rows(qk, count)
    chosen["q and k, whole, upper half of the blocks"] = {
        name: mask for name, mask in qk.masks.items() if name.startswith(tuple(upper))
    }
    chosen["all kinds, scattered entries, 90 %"] = scattered(blocks, round(0.1 * len(blocks)))
    if mask_file is not None:
        chosen[f"mask {mask_file.name}"] = read_mask_file(mask_file)[0]
    return chosen


def rows(entries: Entries, count: int) -> Mask:
    """Whole rows of the entries' weights, drawn alike, of ``count`` entries in all."""
    weights = {name: mask for name, mask in entries.masks.items() if mask.dim() == 2}
    width = next(iter(weights.values())).shape[1]
    chosen = scattered(Entries({name: mask.all(1) for name, mask in weights.items()}), round(count / width))
    return {name: row.unsqueeze(1).repeat(1, width) for name, row in chosen.items()}


def steps(
    options: Options, mask: Mask, count: int, weights: Weights | None = None
) -> tuple[Callable[[], object], Optimizer]:
    """A call that takes ``count`` training steps, and the optimiser that it steps."""
    torch.set_num_threads(options.threads)
    moving = MaskedParameters(build(options, weights), mask)
    optimizer = make_optimizer(moving.parameters, moving.entries, rule="adamw", learning_rate=1e-4, weight_decay=0.01)
    images = torch.randn(
        options.batch_size, 3, options.image_size, options.image_size, generator=torch_generator(0, "images")
    ).to(options.device)
    labels = torch.arange(options.batch_size, device=options.device) % CLASSES
    batches = [(images, labels)] * count
    call = partial(
        train,
        moving,
        batches,
        optimizer,
        learning_rate=lambda _: 1e-4,
        clip_norm=1.0,
        precision=options.precision,
    )
    return call, optimizer


def two_steps(options: Options, mask: Mask) -> Callable[[], object]:
    """Two, for in the second gradients, activations and the optimiser's state are there together."""
    return steps(options, mask, 2)[0]


def state_bytes(optimizer: Optimizer) -> int:
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def measure(options: Options) -> str:
    """The table in Markdown, under a line on the machine and the setting."""
    torch.set_num_threads(options.threads)
    weights = None if options.weights is None else load_weights(options.weights, options.model_size)
    model = build(options, weights)
    masks = variants(model, options.mask)
    eligible = len(eligible_entries(model))
    # Random weights there: memory does not depend on their values.
    peaks = {name: peak_memory(two_steps, options, mask) for name, mask in masks.items()}
    prepared = {name: steps(options, mask, 1, weights) for name, mask in masks.items()}
    timings = timed_ratios({name: call for name, (call, _) in prepared.items()}, options.repeats)
    dense = multiply_adds(model, masks["dense"])
    lines = []
    for name, mask in masks.items():
        moving, timing = sum(int(tensor.sum()) for tensor in mask.values()), timings[name]
        lines.append(
            (
                name,
                f"{moving:,}",
                f"{100 * moving / eligible:.1f} %",
                f"{1e3 * timing.seconds:.1f}",
                f"{timing.ratio:.2f}",
                f"{multiply_adds(model, mask) / dense:.2f}",
                f"{state_bytes(prepared[name][1]) / 2**20:.1f}",
                f"{peaks[name] / 2**20:.0f}",
            )
        )
    setting = (
        f"{environment()}; ViT-{options.model_size}/{options.patch_size}, "
        f"{'random weights' if weights is None else Path(weights.source).name}, {options.image_size} px, "
        f"batch {options.batch_size}, {options.precision}, median of {options.repeats}"
    )
    header = ("moves", "entries", "of eligible", "ms a step", "ratio", "floor", "state, MiB", "peak, MiB")
    return f"{setting}\n\n{markdown_table(header, lines)}"


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    table = measure(options)
    sys.stdout.write(table)
    if options.output is not None:
        options.output.write_text(table, encoding="utf-8")
