"""What bf16 costs in accuracy, on real images, wherever it runs: fp32 beside bf16 products, over seeds.

    python benchmarks/bf16_accuracy.py --seeds 0 1 2 --output FILE -- federated --weights FILE --image_size 64 ...

bf16 is imitated, since few CPUs compute it: operands and results of every matrix product and convolution, forward and
backward, are rounded to bf16, with sums in float32, and attention is in plain products. That is what autocast does but
for the activation functions between products, which it computes in bf16 and this does not. Evaluation is the same.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import tyro
import yaml
from measure import environment, markdown_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedtalos.cli import main as fedtalos
from fedtalos.models.transformer_layers import Attention

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "mkldnn_convolution"}


class Bf16Products(TorchDispatchMode):
    """Inside, products take and give values that bf16 can hold."""

    def __torch_dispatch__(
        self, function: Any, _types: object, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function.__name__.split(".")[0] not in PRODUCTS:
            return function(*arguments, **(options or {}))
        out = function(*map(rounded, arguments), **(options or {}))
        return tuple(map(rounded, out)) if isinstance(out, tuple) else rounded(out)


def rounded(value: Any) -> Any:
    """A float32 tensor as bf16 has it, still float32; anything else as it is."""
    return value.bfloat16().float() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


@dataclass(frozen=True)
class Options:
    command: Annotated[tuple[str, ...], tyro.conf.Positional]
    """what to run: a command of fedtalos with its options, but for seed, run name, device and precision"""
    seeds: tuple[int, ...] = (0, 1, 2)
    output: Path | None = None
    """also write the table here"""


def accuracy(options: Options, seed: int, name: str, inside: Callable[[ExitStack], object]) -> float:
    """Test accuracy (%) of the last model."""
    run = f"bf16-accuracy-{name}-{seed}"
    with ExitStack() as stack:
        inside(stack)
        fedtalos([*options.command, "--seed", str(seed), "--run_name", run, "--device", "cpu", "--precision", "fp32"])
    summary = yaml.safe_load(Path("results", run, "summary.yaml").read_text())
    return 100 * float(summary["test_accuracy"]["last"])


def imitate(stack: ExitStack) -> None:
    stack.enter_context(Bf16Products())
    Attention.fused = False
    stack.callback(setattr, Attention, "fused", True)


def main(options: Options) -> None:
    rows, differences = [], []
    for seed in options.seeds:
        fp32 = accuracy(options, seed, "fp32", lambda _: None)
        bf16 = accuracy(options, seed, "bf16", imitate)
        differences.append(bf16 - fp32)
        rows.append((seed, f"{fp32:.2f}", f"{bf16:.2f}", f"{bf16 - fp32:+.2f}"))
    spread = f" ± {stdev(differences):.2f}" if len(differences) > 1 else ""
    rows.append(("mean", "", "", f"{mean(differences):+.2f}{spread}"))
    text = f"{environment()}\n\n{markdown_table(('seed', 'fp32, test %', 'bf16 products', 'difference'), rows)}"
    sys.stdout.write(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
