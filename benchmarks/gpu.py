"""How near federated rounds come to what a device can do: rounds, images and TFLOP/s, beside its measured matmul peak.

    PYTHONPATH=src python benchmarks/gpu.py                    needs only torch and numpy; --device cuda by default
    PYTHONPATH=src python benchmarks/gpu.py --smoke            everything but torch.compile, tiny, on the CPU
    PYTHONPATH=src python benchmarks/gpu.py --sizes small --pixels 224 --precisions bf16 --parts rounds rivals

A round is fedtalos' own: 10 of 20 clients, 4 steps of 64 images each, random uint8 images that live on the device,
cropped and flipped there, AdamW, clipping, averaging; no evaluation. Clients train one by one or V together
(training/federated/stacked.py): eagerly, with every step a CUDA graph, or compiled and a graph. The last two lines of a
setting are what bounds it (prototype_step.py): a bare eager step of one client, and one of V compiled and captured,
with neither data nor rounds around it; its masked step moves the weights of q, k and v. Rounds are computed as runs
compute them on CUDA, with deterministic algorithms; "any order" is the same without, and so are the bounds.

FLOPs are counted from the model's matrix products (two per multiply-add), what a mask spares left out. "of peak" is the
share of a large square product's speed in the same precision, measured in the same run. "first, s" is the time until
the first round is done: compiling and capturing are in it. To have the second run's, which finds inductor's cache, run
twice with $TORCHINDUCTOR_CACHE_DIR set. Where a graph or a compilation failed, the line says so. Behind the tables:
which kernels a step's time goes to (kernels.py), and, if asked for, other simulators where this Python has them
(peers/). The output grows line by line: of a run that is stopped, what it had measured is there.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast, get_args

import torch
from fisher import Work
from kernels import kernel_table
from measure import environment, markdown_table, synchronize
from prototype_step import Prototype, seconds_a_step
from rivals import rival_table
from rounds import Load, Rounds, Setting, Variant, random_images

from fedtalos.data.images import LabelledImages
from fedtalos.devices import same_numbers_on_cuda
from fedtalos.notes import noted
from fedtalos.training.engine.capture import Compile, first_line
from fedtalos.training.evaluation import evaluate
from fedtalos.training.federated.fedavg import Engine, Round, one_by_one
from fedtalos.training.federated.stacked import stacked

HEADER = (
    *("precision", "moves", "clients", "images/s", "to one by one", "rounds/s", "first, s"),
    *("TFLOP/s", "of peak", "GiB"),
)
MOVES = ("all", "90 % q/k")
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


@dataclass(frozen=True)
class Way:
    """How a round's clients train."""

    at_once: int | None = None
    compile: Compile = "off"
    any_order: bool = False

    @property
    def engine(self) -> Engine:
        """One by one where ``at_once`` is None."""
        if self.at_once is None:
            return one_by_one
        return partial(stacked, size=self.at_once, compile=self.compile)

    @classmethod
    def of(cls, word: str) -> "Way":
        """Read 10:off, 10:graph, 10:on or 10:any; the last is on, in any order."""
        together, _, how = word.partition(":")
        if how not in (*get_args(Compile), "any") or not together.isdecimal():
            raise argparse.ArgumentTypeError(f"{word}: expected clients and a way, such as 10:graph, 10:on or 10:any")
        return cls(int(together), "on" if how == "any" else cast(Compile, how), any_order=how == "any")

    def __str__(self) -> str:
        if self.at_once is None:
            return "one by one"
        words = {"off": "", "graph": ", graph", "on": ", compiled, graph"}
        return f"{self.at_once} together{words[self.compile]}" + ", any order" * self.any_order


@dataclass(frozen=True)
class Measured:
    """Seconds until the first call was done, and of a later one."""

    first: float
    seconds: float


def measured(rounds: Iterable[Round], seconds: float) -> Measured:
    """Time rounds: the mean over at least three of them and ``seconds``, after two; one of 0 seconds, after one."""
    going = iter(rounds)
    start = time.perf_counter()
    next(going)
    synchronize()
    first = time.perf_counter() - start
    if seconds:
        next(going)
        synchronize()
    start, count = time.perf_counter(), 0
    while count < (3 if seconds else 1) or time.perf_counter() - start < seconds:
        next(going)
        synchronize()
        count += 1
    return Measured(first, (time.perf_counter() - start) / count)


def ways(device: torch.device, at_once: Sequence[int], *, smoke: bool) -> list[Way]:
    """One by one first, then together; as graphs and compiled where there is CUDA. A smoke test has graphs' twins."""
    found = [Way(), *(Way(together) for together in at_once)]
    if device.type == "cuda" or smoke:
        found += [Way(together, "graph") for together in (1, *at_once)]
    if device.type == "cuda":
        found += [Way(together, "on") for together in (1, *at_once)]
        found += [Way(max(at_once, default=1), "on", any_order=True)]
    return found


def in_one_order(device: torch.device, wanted: bool) -> None:
    """Take torch's deterministic algorithms, as runs on CUDA do, or whatever is fastest."""
    if device.type == "cuda" and wanted:
        same_numbers_on_cuda()
    else:
        torch.use_deterministic_algorithms(False)


class Table:
    """The lines of one setting in one precision, for what moves; a line that fails says why."""

    def __init__(
        self, setting: Setting, load: Load, images: LabelledImages, precision: str, moves: str, peak: float
    ) -> None:
        self.setting, self.load, self.images, self.peak = setting, load, images, peak
        self.precision, self.moves, self.device = precision, moves, images.pixels.device
        self._alone = float("nan")

    def round(self, way: Way) -> tuple[object, ...]:
        """Rounds of fedtalos."""

        def measure() -> tuple[Measured, int, float]:
            in_one_order(self.device, not way.any_order)
            work = Rounds(self.setting, Variant(self.precision, self.moves), self.load, self.images)
            found = measured(work.rounds(way.engine), self.load.seconds)
            images = self.load.images_per_round
            if way.at_once is None:
                self._alone = found.seconds / images
            return found, images, 2 * work.multiply_adds * images

        return self._line(str(way), measure)

    def bound(self, clients: int, *, best: bool) -> tuple[object, ...]:
        """The prototype's steps: eager and of one client, or the ``best`` that it can."""

        def measure() -> tuple[Measured, int, float]:
            in_one_order(self.device, False)
            moves = "all" if self.moves == "all" else "qkv"
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            sizes = (self.setting.size, self.setting.pixels, self.setting.patch, clients, self.load.batch_size)
            start = time.perf_counter()
            step = Prototype(*sizes, moves=moves, dtype=dtype).step(self.device, compiled=best, captured=best)
            step()
            synchronize()
            first = time.perf_counter() - start
            images = clients * self.load.batch_size
            work = Rounds(self.setting, Variant(self.precision, self.moves), self.load, self.images)
            return (
                Measured(first, seconds_a_step(step, self.device, steps=10 if self.load.seconds else 1)),
                images,
                2 * work.multiply_adds * images,
            )

        return self._line(f"prototype, {clients} compiled, graph" if best else "bare eager step", measure)

    def _line(self, name: str, measure: Callable[[], tuple[Measured, int, float]]) -> tuple[object, ...]:
        set_float32(self.device, self.precision)
        torch.compiler.reset()
        noted()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found, images, flops = measure()
        except RuntimeError as error:  # out of memory, or what a compiler cannot do
            return (self.precision, self.moves, f"{name}: {first_line(error)[:80]}", *[""] * 7)
        if self.device.type == "cuda" and (failed := fallen_back()):
            name += f": {failed}"
        a_second = images / found.seconds
        return (
            *(self.precision, self.moves, name, f"{a_second:.0f}", f"{a_second * self._alone:.2f}"),
            f"{a_second / self.load.images_per_round:.2f}",
            f"{found.first:.1f}",
            f"{flops / found.seconds / 1e12:.3g}",
            f"{100 * flops / found.seconds / self.peak:.1f} %",
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if self.device.type == "cuda" else "",
        )


def rows(
    setting: Setting,
    load: Load,
    device: torch.device,
    chosen: Sequence[Way],
    what: Sequence[str],
    peaks: dict[str, float],
) -> Iterator[tuple[object, ...]]:
    """The table of a setting, line by line."""
    images = random_images(setting, load, device)
    most = max(way.at_once or 1 for way in chosen)
    for precision, peak in peaks.items():
        for moves in what:
            table = Table(setting, load, images, precision, moves, peak)
            yield from map(table.round, chosen)
            yield table.bound(1, best=False)
            yield table.bound(most, best=True)


def fallen_back() -> str:
    """Why graphs or compiled steps were not, since notes were taken last; empty where they were."""
    said = noted()
    return "; ".join(said[what] for what in ("graphs", "compile") if what in said)


def fisher_line(setting: Setting, load: Load, device: torch.device) -> str:
    """Per-example Fisher scores of all eligible tensors, in strict float32 as always, beside passes and a loop.

    A pass is a plain forward and backward over the same images; TF32 on CUDA and strict.
    """
    in_one_order(device, True)
    chunk, found = 16 if device.type == "cpu" else 64, {}
    for name, method, images, precision in (
        ("scores", Work.ours, load.fisher_images, "fp32"),
        ("pass", Work.training, load.fisher_images, "fp32"),
        ("pass in TF32", Work.training, load.fisher_images, "tf32"),
        ("loop", Work.loop, min(16, load.fisher_images), "fp32"),
    ):
        set_float32(device, precision)
        work = Work(setting.size, setting.pixels, setting.patch, images, device.type, chunk)
        method(work)
        synchronize()
        start = time.perf_counter()
        method(work)
        synchronize()
        found[name] = 1e3 * (time.perf_counter() - start) / images
    ours = found["scores"]
    return (
        f"\nFisher scores: {ours:.3g} ms an image, {ours / found['pass']:.2f} of a plain pass in strict float32, "
        f"{ours / found['pass in TF32']:.2f} of one in TF32; a loop over images takes {found['loop'] / ours:.1f} times "
        "as long.\n"
    )


def evaluation_line(setting: Setting, load: Load, images: LabelledImages, precision: str) -> str:
    """Evaluation of all images, as it stands and as a CUDA graph: ms an image."""
    set_float32(images.pixels.device, precision)
    in_one_order(images.pixels.device, True)
    work = Rounds(setting, Variant(precision, "all"), load, images)
    size, found = min(250, len(images) // 4), []
    for way in ("off", "graph"):
        judge = partial(
            evaluate, work.model, images, batch_size=size, precision=work.local.precision, compile=cast(Compile, way)
        )
        judge()
        synchronize()
        start = time.perf_counter()
        judge()
        synchronize()
        found.append(1e3 * (time.perf_counter() - start) / len(images))
    return f"\nEvaluation in {precision}: {found[0]:.3g} ms an image, as a graph {found[1]:.3g}.\n"


@dataclass(frozen=True)
class Job:
    """What a part is measured on; ``peaks`` by precision."""

    setting: Setting
    load: Load
    device: torch.device
    at_once: Sequence[int]
    ways: Sequence[Way]
    moves: Sequence[str]
    peaks: dict[str, float]
    smoke: bool

    @property
    def precision(self) -> str:
        """That of all parts but the rounds: the last."""
        return list(self.peaks)[-1]


def round_part(job: Job) -> Iterator[str]:
    """The table, longer by a line each time."""
    lines = []
    chosen = [Way(), *job.ways] if job.ways else ways(job.device, job.at_once, smoke=job.smoke)
    for line in rows(job.setting, job.load, job.device, chosen, job.moves, job.peaks):
        print(job.setting, *line, sep=" | ", flush=True)
        lines.append(line)
        yield f"\n{markdown_table(HEADER, lines)}"


def fisher_part(job: Job) -> Iterator[str]:
    yield fisher_line(job.setting, job.load, job.device)


def evaluation_part(job: Job) -> Iterator[str]:
    yield evaluation_line(job.setting, job.load, random_images(job.setting, job.load, job.device), job.precision)


def kernel_part(job: Job) -> Iterator[str]:
    best = Way(max(job.at_once, default=1), "on" if job.device.type == "cuda" else "off")
    set_float32(job.device, job.precision)
    in_one_order(job.device, True)
    images = random_images(job.setting, job.load, job.device)
    work = Rounds(job.setting, Variant(job.precision, "all"), job.load, images)
    table = kernel_table(work.rounds(best.engine), job.load.steps)
    yield f"\n{best}, {job.precision}, everything moves:\n\n{table}"


def rival_part(job: Job) -> Iterator[str]:
    yield f"\n{rival_table(job.setting, job.load, job.device, job.precision)}"


PARTS: dict[str, Callable[[Job], Iterator[str]]] = {
    "rounds": round_part,
    "fisher": fisher_part,
    "evaluation": evaluation_part,
    "kernels": kernel_part,
    "rivals": rival_part,
}


def report(job: Job, parts: Iterable[str]) -> Iterator[str]:
    """The setting's text, which grows; a part that fails says why."""
    text = f"\n## {job.setting}\n"
    for name in parts:
        more = ""
        noted()
        try:
            for more in PARTS[name](job):
                yield text + more
        except RuntimeError as error:
            more += f"\n{name}: failed ({first_line(error)})\n"
        if job.device.type == "cuda" and (failed := fallen_back()):
            more += f"\n{name}: {failed}\n"
        text += more
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), default="cuda")
    parser.add_argument(
        "--smoke", action="store_true", help="all but torch.compile, tiny, on the CPU; its figures mean nothing"
    )
    parser.add_argument("--sizes", nargs="+", default=["micro", "tiny", "small"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[32, 224], help="patches: 4 px at 32, else 16")
    parser.add_argument("--precisions", nargs="+", help="fp32, tf32 (CUDA), bf16; default: all that the device has")
    parser.add_argument("--at_once", nargs="*", type=int, help="clients that train together; default: 5 10, --smoke: 2")
    parser.add_argument("--ways", nargs="*", type=Way.of, default=[], help="such as 1:graph 10:on 10:any; default: all")
    parser.add_argument("--moves", nargs="+", default=MOVES, choices=MOVES, help="what moves; default: both")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS][:-1], help="default: all but the rivals")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-<device name>.md; --smoke: none")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else options.device)
    if options.smoke:
        torch.set_num_threads(1)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: not available here; take mps or cpu, or --smoke")
        torch.cuda.init()
    load, at_once = (SMOKE, [2]) if options.smoke else (Load(), [5, 10])
    at_once = at_once if options.at_once is None else options.at_once
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
        job = Job(setting, load, device, at_once, options.ways, options.moves, peaks, options.smoke)
        grown = ""
        for grown in report(job, options.parts):
            if output:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(text + grown, encoding="utf-8")
        text += grown
    print(text, end="")


if __name__ == "__main__":
    main()
