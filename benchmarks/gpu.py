"""How near federated rounds come to what a device can do: rounds, images and TFLOP/s, beside its measured matmul peak.

    PYTHONPATH=src python benchmarks/gpu.py                    needs only torch and numpy; --device cuda by default
    PYTHONPATH=src python benchmarks/gpu.py --smoke            everything, tiny, on the CPU

A round is fedtalos' own: 10 of 20 clients, 4 steps of 64 images each, random uint8 images that live on the device,
cropped and flipped there, AdamW, clipping, averaging; no evaluation. Clients train one by one or V together
(training/federated/stacked.py). FLOPs are counted from the model's matrix products (two per multiply-add), what a mask
spares left out. "of peak" is the share of a large square product's speed in the same precision, measured in the same
run.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from fisher import Work
from measure import environment, markdown_table, synchronize
from rounds import Load, Rounds, Setting, Variant, random_images

HEADER = ("precision", "moves", "clients", "rounds/s", "to one by one", "images/s", "TFLOP/s", "of peak", "GiB")
SMOKE = Load(clients=4, per_round=2, steps=2, batch_size=2, seconds=0.0, gemm_side=128, fisher_images=4)


def set_float32(device: torch.device, precision: str) -> None:
    """Strict float32 products for fp32; TF32 on CUDA for the others, as fedtalos has it (devices.py)."""
    strict = precision == "fp32" or device.type != "cuda"
    torch.set_float32_matmul_precision("highest" if strict else "high")
    torch.backends.cudnn.allow_tf32 = not strict


def matmul_peak(device: torch.device, precision: str, side: int) -> float:
    """FLOP/s of a square matrix product, best of ten timings of ten products."""
    set_float32(device, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 10 * 2 * side**3 / best


def measured(work: Rounds) -> tuple[int, float]:
    """FLOPs of a round, and its seconds: the mean over at least three rounds and ``load.seconds``, after two."""
    rounds = iter(work)
    for _ in range(2):
        next(rounds)
    synchronize()
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < work.load.seconds:
        next(rounds)
        synchronize()
        count += 1
    seconds = (time.perf_counter() - start) / count
    return 2 * work.multiply_adds * work.load.images_per_round, seconds


def variants(device: torch.device, precisions: Sequence[str], at_once: Sequence[int]) -> list[Variant]:
    """Of every precision and mask: one by one first, then together, then compiled (CUDA, all but strict fp32)."""
    found = []
    for precision in precisions:
        for moves in ("all", "90 % q/k"):
            found += [Variant(precision, moves, together) for together in (1, *at_once)]
            if device.type == "cuda" and precision != "fp32":
                found += [Variant(precision, moves, compiled=mode) for mode in ("default", "reduce-overhead")]
    return found


def rows(
    setting: Setting, load: Load, device: torch.device, chosen: Sequence[Variant], peaks: dict[str, float]
) -> Iterator[tuple[object, ...]]:
    """The table of a setting, line by line; a variant that fails says so in its line."""
    images, alone = random_images(setting, load, device), float("nan")
    for variant in chosen:
        set_float32(device, variant.precision)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        name = (variant.precision, variant.moves, str(variant))
        try:
            flops, seconds = measured(Rounds(setting, variant, load, images))
        except RuntimeError as error:  # out of memory, or what a compiler cannot do
            yield (*name, type(error).__name__, *[""] * 5)
            continue
        if str(variant) == "one by one":
            alone = seconds
        yield (
            *name,
            f"{1 / seconds:.2f}",
            f"{alone / seconds:.2f}",
            f"{load.images_per_round / seconds:.0f}",
            f"{flops / seconds / 1e12:.3g}",
            f"{100 * flops / seconds / peaks[variant.precision]:.1f} %",
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "",
        )


def fisher_line(setting: Setting, load: Load, device: torch.device) -> str:
    """Per-example Fisher scores of all eligible tensors against a loop over examples: ms an image, TF32 on CUDA."""
    set_float32(device, "tf32")
    found = []
    for images, method in ((load.fisher_images, Work.ours), (min(16, load.fisher_images), Work.loop)):
        work = Work(
            setting.size, setting.pixels, setting.patch, images, device.type, 16 if device.type == "cpu" else 64
        )
        method(work)
        synchronize()
        start = time.perf_counter()
        method(work)
        synchronize()
        found.append(1e3 * (time.perf_counter() - start) / images)
    ours, loop = found
    return (
        f"\nFisher scores: {ours:.3g} ms an image, a loop over images {loop:.3g} ms, {loop / ours:.1f} times as long.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="everything, tiny, on the CPU; its figures mean nothing")
    parser.add_argument("--sizes", nargs="+", default=["micro", "tiny", "small"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[32, 224], help="patches: 4 px at 32, else 16")
    parser.add_argument("--precisions", nargs="+", help="fp32, tf32 (CUDA), bf16; default: all that the device has")
    parser.add_argument("--at_once", nargs="*", type=int, default=[2, 5, 10], help="clients that train together")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-<device name>.md; --smoke: none")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: not available here; take mps or cpu, or --smoke")
        torch.cuda.init()
    load = SMOKE if options.smoke else Load()
    settings = [Setting(s, px, 4 if px == 32 else 16) for px in options.pixels for s in options.sizes]
    settings = [Setting("micro", 8, 4)] if options.smoke else settings
    precisions = options.precisions or (["fp32", "tf32", "bf16"] if device.type == "cuda" else ["fp32", "bf16"])
    peaks = {precision: matmul_peak(device, precision, load.gemm_side) for precision in precisions}
    name = environment().split(", ")[0]
    output = options.output or (
        None if options.smoke else Path(__file__).parent / "results" / f"gpu-{name.replace(' ', '-')}.md"
    )
    text = f"{environment()}; matmul peak, TFLOP/s: "
    text += ", ".join(f"{precision} {peak / 1e12:.3g}" for precision, peak in peaks.items()) + "\n"
    print(text, end="")
    for setting in settings:
        lines = []
        for line in rows(setting, load, device, variants(device, precisions, options.at_once), peaks):
            print(setting, *line, sep=" | ", flush=True)
            lines.append(line)
        text += f"\n## {setting}\n\n{markdown_table(HEADER, lines)}{fisher_line(setting, load, device)}"
        if output:
            output.parent.mkdir(exist_ok=True)
            output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
