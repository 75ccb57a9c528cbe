"""What choosing the entries of a mask costs at the size of a ViT-L: seconds and memory beside the floor.

    python benchmarks/selection.py [--entries 302000000] [--output FILE]

The floor in memory: the scores themselves, 4 bytes an entry, one copy of the candidates' scores to be partitioned, and
four bool vectors. The floor in time: reading the scores once from memory.
"""

import argparse
from pathlib import Path

import torch
from measure import environment, markdown_table, peak_memory, timed_ratios

from fedtalos.randomness import torch_generator
from fedtalos.training.editing.ranking import keep_lowest


class Choice:
    """Random scores of an iteration, of whose candidates a share of 0.56 stays, as in round 1 of 4 to a tenth."""

    def __init__(self, entries: int) -> None:
        self.scores = torch.rand(entries, generator=torch_generator(0, "scores"))
        self.kept = torch.ones(entries, dtype=torch.bool)
        self.count = round(0.1**0.25 * entries)

    def read(self) -> None:
        self.scores.sum()

    def ours(self) -> None:
        assert int(keep_lowest(self.scores, self.kept, self.count, 0, 1).sum()) == self.count

    def kthvalue(self) -> None:
        threshold = self.scores.kthvalue(self.count).values
        self.scores.le(threshold)

    def sort(self) -> None:
        torch.zeros_like(self.kept)[self.scores.argsort()[: self.count]] = True


def call(entries: int, method: str) -> object:
    """One method on fresh scores, for a fresh process."""
    return getattr(Choice(entries), method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=302_000_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    choice, methods = Choice(options.entries), ("read", "ours", "kthvalue", "sort")
    timings = timed_ratios({method: getattr(choice, method) for method in methods}, repeats=1, warmup=0)
    del choice
    memory = {method: peak_memory(call, options.entries, method) for method in methods}
    rows = [[m, f"{timings[m].seconds:.1f}", f"{memory[m] / 1e9:.2f}"] for m in methods]
    table = markdown_table([f"{options.entries / 1e6:.0f} M entries", "seconds", "GB above the scores"], rows)
    text = f"{environment()}\n\n{table}"
    print(text, end="")
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
