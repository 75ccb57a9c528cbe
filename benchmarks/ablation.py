"""What each choice is worth, and how a round's cost grows: one process, variants in turns, floors in the same run.

    python benchmarks/ablation.py --output benchmarks/results/ablation.md

Rounds are `fedavg`'s on random images (crop, flip, AdamW, clipping). bf16 is left out where the processor emulates it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import tyro
from measure import environment, markdown_table, scattered, timed_ratios
from rounds import Load, Rounds, Setting, Variant, each, products, random_images
from torch import Tensor

from fedtalos.models.transformer_layers import Attention
from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.entries import Values
from fedtalos.training.federated.fedavg import FedAvg
from fedtalos.training.federated.processes import in_processes, serve
from fedtalos.training.masked_parameters import MaskedParameters

CPU = torch.device("cpu")
TINY = Setting("tiny", 32, 4)
SIZES = (Setting("micro", 32, 4), TINY, Setting("small", 32, 4), Setting("base", 32, 4))


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    repeats: int = 3
    batch_size: int = 64
    output: Path | None = None
    """also write the tables here"""


def choices(options: Options) -> str:
    """Precision, attention, clients in one stack, threads: each against the default, fp32 and fused attention."""
    load = Load(clients=2, per_round=2, steps=1, batch_size=options.batch_size)
    images = random_images(TINY, load, CPU)
    base = Rounds(TINY, Variant("fp32", "all"), load, images)
    plain = Rounds(TINY, Variant("fp32", "all"), load, images)
    for module in plain.model.modules():
        if isinstance(module, Attention):
            module.fused = False
    threads = torch.get_num_threads()
    calls = {
        "fp32, fused attention": each(base),
        "attention by plain products": each(plain),
        "2 clients in one stack": each(Rounds(TINY, Variant("fp32", "all", at_once=2), load, images)),
        f"1 thread instead of {threads}": on_threads(1, each(Rounds(TINY, Variant("fp32", "all"), load, images))),
    }
    speedup = bf16_speedup()
    if speedup > 0.5:
        calls["bf16"] = each(Rounds(TINY, Variant("bf16", "all"), load, images))
    with second_process(base) as spread:
        calls["2 processes of 1 thread"] = on_threads(1, spread)
        lines = rows(calls, options)
    title = (
        f"## Choices\n\n{TINY}, 2 clients, 1 step, dense. A bf16 product is {speedup:.2f} times as fast as an fp32 one"
    )
    return f"{title}{'' if speedup > 0.5 else ', so bf16 is left out'}.\n\n" + markdown_table(("", "s", "ratio"), lines)


def masks(options: Options) -> str:
    """What moves, of a tenth of the blocks' entries and of whole tensors."""
    load = Load(clients=2, per_round=2, steps=1, batch_size=options.batch_size)
    images = random_images(TINY, load, CPU)

    def moving(chosen: Callable[[VisionTransformer], dict[str, Tensor]]) -> Rounds:
        return Rounds(TINY, Variant("fp32", "all"), load, images, chosen)

    works = {
        "everything": Rounds(TINY, Variant("fp32", "all"), load, images),
        "a tenth, scattered over the blocks": moving(a_tenth),
        "a tenth, whole rows": moving(a_tenth_in_rows),
        "a tenth, in q and k": Rounds(TINY, Variant("fp32", "qk"), load, images),
        "all of q, k and v": moving(lambda model: whole(model, "attn.qkv")),
        "the upper half of the blocks": moving(upper_half),
        "the head": Rounds(TINY, Variant("fp32", "head"), load, images),
    }
    lines = rows({name: each(work) for name, work in works.items()}, options)
    counts = [work.multiply_adds / works["everything"].multiply_adds for work in works.values()]
    sent = [len(work.moving) / len(works["everything"].moving) for work in works.values()]
    lines = [(*line, f"{c:.2f}", f"{s:.3f}") for line, c, s in zip(lines, counts, sent, strict=True)]
    header = ("", "s", "ratio", "multiply-adds", "bytes a round")
    return f"## What moves\n\n{TINY}, 2 clients, 1 step; the floor is the multiply-adds.\n\n" + markdown_table(
        header, lines
    )


def sizes(options: Options) -> str:
    """A step of each model beside the products of its multiply-adds."""
    lines = []
    for setting in SIZES:
        batch_size = options.batch_size // (4 if setting.size == "base" else 1)
        load = Load(clients=1, per_round=1, steps=1, batch_size=batch_size)
        work = Rounds(setting, Variant("fp32", "all"), load, random_images(setting, load, CPU))
        found = timed_ratios({"products": products(load, work), "round": each(work)}, options.repeats, warmup=1)
        gflop = 2e-9 * work.multiply_adds * batch_size
        rate, peak = gflop / found["round"].seconds, gflop / found["products"].seconds
        lines.append((str(setting), batch_size, f"{found['round'].seconds:.2f}", f"{rate:.0f}", f"{peak:.0f}"))
    header = ("model", "batch", "s a step", "GFLOP/s", "of products alone")
    return "## Model size\n\nOne client, one step.\n\n" + markdown_table(header, lines)


def clients(options: Options) -> str:
    """Rounds of 1 to 64 clients of 100 and of 100 000 registered: a client costs its steps, however many there are."""
    setting = Setting("micro", 8, 4)
    calls = {}
    for registered, sampled in ((100, 1), (100, 4), (100, 16), (100, 64), (100_000, 16)):
        load = Load(clients=registered, per_round=sampled, steps=1, batch_size=1)
        work = Rounds(setting, Variant("fp32", "all"), load, random_images(setting, load, CPU))
        calls[f"{sampled} of {registered:,}"] = (sampled, each(work))
    found = timed_ratios({name: call for name, (_, call) in calls.items()}, 3 * options.repeats)
    lines = [
        (name, f"{1e3 * found[name].seconds:.0f}", f"{1e3 * found[name].seconds / sampled:.1f}")
        for name, (sampled, _) in calls.items()
    ]
    return f"## Clients\n\n{setting}, one step on one image.\n\n" + markdown_table(("", "ms", "ms a client"), lines)


def aggregation(options: Options) -> str:
    """The running mean of ten clients' values beside the plainest pass over the same bytes: two read, one written."""
    setting, load = Setting("small", 32, 4), Load(clients=1, per_round=1, steps=1, batch_size=1)
    model = Rounds(setting, Variant("fp32", "all"), load, random_images(setting, load, CPU)).model
    qk = eligible_entries(model, "qk")
    kinds = {
        "dense": whole(model, ""),
        "a tenth, in q and k": scattered(qk, round(0.1 * len(eligible_entries(model)))),
        "a tenth, scattered over the blocks": a_tenth(model),
    }
    lines = []
    for name, chosen in kinds.items():
        moving = MaskedParameters(model, chosen)
        found = timed_ratios(means_of_ten(moving), 3 * options.repeats)
        lines.append((name, f"{len(moving):,}", *(f"{1e3 * t.seconds:.0f}" for t in found.values())))
    header = ("ViT-S", "entries", "floor, ms", "whole rows (ours), ms", "gathered by index, ms")
    return "## The mean of ten clients\n\n" + markdown_table(header, lines)


def means_of_ten(moving: MaskedParameters) -> dict[str, Callable[[], object]]:
    mean, values = Values(moving.rows), moving.rows
    left, right = torch.randn(len(moving)), torch.randn(len(moving))
    return {
        "floor": lambda: [torch.add(left, right, out=left) for _ in range(10)],
        "rows": lambda: [torch._foreach_lerp_(mean.parts, values, 0.1) for _ in range(10)],
        "by index": lambda: [left.lerp_(moving.vector(), 0.1) for _ in range(10)],
    }


def bf16_speedup() -> float:
    """Time of a small matrix product in fp32 over bf16's, the median of four each."""
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(shape, dtype=dtype) for shape in ((256, 384), (384, 384)))
        calls[str(dtype)] = lambda left=left, right=right: left @ right
    fp32, bf16 = timed_ratios(calls, repeats=4).values()
    return fp32.seconds / bf16.seconds


def rows(calls: dict[str, Callable[[], object]], options: Options) -> list[tuple[str, ...]]:
    found = timed_ratios(calls, options.repeats, warmup=1)
    return [(name, f"{t.seconds:.2f}", f"{t.ratio:.2f}") for name, t in found.items()]


def whole(model: VisionTransformer, part: str) -> dict[str, Tensor]:
    """All of the tensors whose name holds ``part``, and the head."""
    return {
        name: torch.ones_like(p, dtype=torch.bool, requires_grad=False)
        for name, p in model.named_parameters()
        if part in name or name.startswith("head")
    }


def upper_half(model: VisionTransformer) -> dict[str, Tensor]:
    """All of the upper half of the blocks, and the head."""
    depth = len(model.blocks)
    blocks = [whole(model, f"blocks.{number}.") for number in range(depth // 2, depth)]
    return {name: mask for block in blocks for name, mask in block.items()}


def a_tenth(model: VisionTransformer) -> dict[str, Tensor]:
    """Of the eligible entries, drawn alike; and the head."""
    eligible = eligible_entries(model)
    return scattered(eligible, len(eligible) // 10) | whole(model, "head")


def a_tenth_in_rows(model: VisionTransformer) -> dict[str, Tensor]:
    """The first tenth of the rows of every weight that is eligible; and the head."""
    chosen = {}
    for name, mask in eligible_entries(model).masks.items():
        if mask.dim() == 2:
            chosen[name] = torch.zeros_like(mask)
            chosen[name][: -(-len(mask) // 10)] = True
    return chosen | whole(model, "head")


def on_threads(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """``call`` on so many threads, which are then as many as before."""

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        call()
        torch.set_num_threads(before)

    return run


@contextmanager
def second_process(alone: Rounds) -> Iterator[Callable[[], object]]:
    """A call that takes the next round on this process and another one."""
    with TemporaryDirectory() as folder:
        other = get_context("spawn").Process(target=follow, args=(alone.setting, alone.load, folder), daemon=True)
        other.start()
        work = Rounds(alone.setting, alone.variant, alone.load, alone.clients.images)
        meet(0, folder)
        yield each(work.rounds(in_processes))
        other.kill()
        other.join()
        dist.destroy_process_group()


def follow(setting: Setting, load: Load, folder: str) -> None:
    torch.set_num_threads(1)
    work = Rounds(setting, Variant("fp32", "all"), load, random_images(setting, load, CPU))
    meet(1, folder)
    serve(work.moving, work.clients, work.local, 0, FedAvg(), lambda *_: [])


def meet(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)


def main(options: Options) -> None:
    text = f"{environment()}, median of {options.repeats}\n\n"
    text += "\n".join(part(options) for part in (choices, masks, sizes, clients, aggregation))
    sys.stdout.write(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
