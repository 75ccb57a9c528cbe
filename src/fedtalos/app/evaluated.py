"""Evaluation by class: tables and a figure for evaluations/NAME/, and a few lines to read at once."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedtalos.app.run.recorder import write_lines
from fedtalos.errors import printable
from fedtalos.training.confusion import Confusion

MOST = 8
"""Classes, or mistakes, that are printed."""


def write_per_class(path: Path, found: Confusion, classes: Sequence[str]) -> None:
    """Write a line per class: images, how many were recognised (recall), and how many answers were right (precision).

    Shares are 0 to 1, and empty where there is nothing to divide by.
    """
    rows: list[list[object]] = [["class", "images", "correct", "recall", "answers", "precision"]]
    for label, name in enumerate(classes):
        images, correct, answers = (int(of[label]) for of in (found.examples, found.correct, found.answered))
        rows.append([name, images, correct, _share(correct, images), answers, _share(correct, answers)])
    write_lines(path, rows)


def write_confusion(path: Path, found: Confusion, classes: Sequence[str]) -> None:
    """Write the matrix of counts: a line per true class, a column per answer."""
    rows = [[name, *counts] for name, counts in zip(classes, found.counts.tolist(), strict=True)]
    write_lines(path, [["true class", *classes], *rows])


def lowest_classes(found: Confusion, classes: Sequence[str]) -> Table:
    """Make a table of the classes that are recognised least."""
    there = [label for label in range(len(classes)) if found.examples[label]]
    order = sorted(there, key=lambda label: (float(found.correct[label] / found.examples[label]), label))
    of_all = f"{MOST} lowest of {len(there)} classes" if len(there) > MOST else "class"
    table = _table(of_all, "accuracy (%)", "right", "images")
    for label in order[:MOST]:
        correct, images = int(found.correct[label]), int(found.examples[label])
        table.add_row(Text(printable(classes[label])), f"{100 * correct / images:.1f}", str(correct), str(images))
    return table


def most_confused(found: Confusion, classes: Sequence[str]) -> Table:
    """Make a table of the most frequent mistakes."""
    table = _table("most frequent mistakes", "images")
    for true, answer, images in found.most_confused(MOST):
        table.add_row(Text(printable(f"{classes[true]} taken for {classes[answer]}")), str(images))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _share(part: int, of: int) -> str:
    return f"{part / of:.6f}" if of else ""
