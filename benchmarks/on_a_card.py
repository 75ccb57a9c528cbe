"""The day a card is at hand: what has never run on one, in order of use, each step within its time.

    python benchmarks/on_a_card.py OUT --data data --weights vit_tiny_patch16_224.safetensors --minutes 25
    python benchmarks/on_a_card.py OUT --only tests kernels      some steps alone
    python benchmarks/on_a_card.py OUT --smoke                   all of it, tiny, on a CPU; its figures mean nothing

Every step writes to OUT as it goes, so that what was measured is there whatever ends it. A step that lacks a package
says so and is left out. The steps "tasks" merge vectors of tasks once, at 224 px. The last one, the grid field_tiny,
takes the time that is left; the same command with the same OUT goes on with it, also where OUT holds grid.tar.gz alone,
which has its finished runs. One H200 took one to five minutes for a step before that, and 50 s for a run of the grid.
"""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMERIC = [f"tests/{part}" for part in ("training", "federated", "editing", "models")]
RATES = {"dense": ["1e-4", "3e-4"], "random": ["1e-3", "3e-3"], "talos": ["3e-3", "1e-2"]}
"""Masks of the study of tasks, and learning rates to choose from."""
PATIENCE = 30
"""Seconds that a step has to save what it has, when its time is over."""


@dataclass(frozen=True)
class Step:
    """A command and the packages that it needs; ``minutes`` is the most that it may take."""

    name: str
    command: Sequence[str]
    minutes: float
    needs: Sequence[str] = ()

    def run(self, out: Path, seconds: float) -> str:
        """Run the command, its words to OUT/NAME.txt, and tell what became of it."""
        if lacks := [package for package in self.needs if not installed(package)]:
            return f"left out: this Python lacks {', '.join(lacks)}"
        if (limit := min(60 * self.minutes, seconds)) < 1:
            return "left out: no time is left"
        words = {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
        start = time.monotonic()
        with (out / f"{self.name}.txt").open("w") as log:
            running = subprocess.Popen(
                [sys.executable, *self.command],
                cwd=ROOT,
                env=os.environ | words,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            how = ended(running, limit)
        return f"{how} after {time.monotonic() - start:.0f} s"


def ended(running: subprocess.Popen[bytes], limit: float) -> str:
    """Wait for a process; when its time is over, let it and its children save what they have, then end them."""
    try:
        return f"ended with code {running.wait(limit)}"
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGTERM)
    try:
        running.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    return "stopped, its time was over,"


def installed(package: str) -> bool:
    """Tell whether this Python has a distribution of that name."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def steps(out: Path, data: Path, weights: Path, *, smoke: bool) -> list[Step]:
    """The steps, in order: first what may be wrong, then how fast it is, then what it is for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = [requirement.split(">")[0] for requirement in project["dependencies"]]
    testing = [*ours, "pytest", "hypothesis"]
    several = ["-n", "8"] if installed("pytest-xdist") else []
    tests, grid = [*several, *NUMERIC, "-k", "cuda"], ["field_tiny", "--data_dir", str(data), "--weights", str(weights)]
    real = ["--data_dir", str(data), "--weights", str(weights)]
    apart = [*real, "--image_size", "224", "--precision", "bf16", "--compile", "graph", "--rules", "sum"]
    apart += ["--refit", "sum", "--negate", "0", "--interference", "0"]
    rates = RATES
    if smoke:
        apart = [*real, "--image_size", "32", "--limit", "600", "--seeds", "0", "--epochs", "1", "--negate", "0"]
        rates = {"random": ["1e-3"]}
        tests, grid = ["tests/training/test_metrics.py"], ["digits", "--only", "digits-start", "--device", "cpu"]

    def measure(name: str, minutes: float, parts: str, *settings: str) -> Step:
        choice = ["--smoke"] if smoke else ["--at_once", "10", "--ways", "1:graph", "10:graph", "10:on", *settings]
        output = ["--output", str(out / f"{name}.md"), "--precisions", "bf16", "--parts", *parts.split()]
        return Step(name, ["benchmarks/gpu.py", *choice, *output], minutes)

    largest, tiny = ("--sizes", "small", "--pixels", "224"), ("--sizes", "tiny", "--pixels", "32")
    sweep = ["main.py", "sweep", *grid, "--output_dir", str(out / "grid")]
    return [
        Step("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "40", *tests], 4, testing),
        measure("gpu_tiny_32", 5, "kernels rounds fisher evaluation", *tiny),
        measure("gpu_small_224", 5, "kernels rounds fisher evaluation", *largest),
        measure("gpu_tiny_224", 5, "kernels rounds", "--sizes", "tiny", "--pixels", "224"),
        measure("rivals", 4, "rivals", *tiny),
        *(
            Step(f"tasks_{mask}", ["benchmarks/tasks.py", *apart, "--masks", mask, "--rates", *two], 600, ours)
            for mask, two in rates.items()
        ),
        Step("grid_seed_0", [*sweep, "--seeds", "0"], 600, ours),
        Step("grid", sweep, 600, ours),
    ]


def pack(out: Path) -> None:
    """Put the grid's finished runs, and the masks that the others start from, into one small file."""
    results = out / "grid" / "results"
    if not results.is_dir():
        return
    begun = {run for run in results.iterdir() if (run / "config.yaml").is_file()}
    unfinished = {run for run in begun if not (run / "summary.yaml").is_file()}
    with tarfile.open(out / "grid.tar.gz", "w:gz") as packed:
        for path in sorted({*results.iterdir(), out / "grid" / "masks"} - unfinished):
            if path.exists():
                packed.add(path, path.relative_to(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for what comes out")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of CIFAR-100")
    parser.add_argument("--weights", type=Path, default=Path("vit_tiny_patch16_224.safetensors"), help="a ViT-Ti/16")
    parser.add_argument("--minutes", type=float, default=25, help="for all of it")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="some steps alone; a name that is none lists them")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if (out / "grid.tar.gz").is_file() and not (out / "grid").exists():
        with tarfile.open(out / "grid.tar.gz") as packed:
            packed.extractall(out, filter="data")
    found = steps(out, options.data.resolve(), options.weights.resolve(), smoke=options.smoke)
    names = [step.name for step in found]
    if unknown := set(options.only or names) - set(names):
        parser.error(f"--only {' '.join(sorted(unknown))}: expected some of {' '.join(names)}")
    for step in found:
        if options.only is None or step.name in options.only:
            print(f"{step.name}: {step.run(out, end - time.monotonic())}", flush=True)
    pack(out)


if __name__ == "__main__":
    main()
