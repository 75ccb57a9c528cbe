"""Courses of continual learning: accuracy of every task after every task, by rule and head, as a table and a CSV."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from annotated_types import Interval
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedtalos.app.merging import factor
from fedtalos.app.run.apart import AFTER, Apart
from fedtalos.app.run.display import say
from fedtalos.app.run.recorder import cell, known, write_csv
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.facts import read_table, table_schema
from fedtalos.models.heads import set_head
from fedtalos.training.editing.merging import merge
from fedtalos.training.editing.task_vectors import scaled
from fedtalos.training.federated.continual import Course
from fedtalos.training.task_accuracy import Floats, task_accuracy

Row = Literal["sequential", "magmax", "sum"]
ROWS: tuple[Row, ...] = get_args(Row)
"""One task after another by FedAvg; MagMax of these; the sum of vectors of tasks that trained apart."""
HeadName = Literal["first", "refitted"]
HEADS: tuple[HeadName, ...] = get_args(HeadName)
FILE = "continual.csv"


@table_schema
@dataclass(frozen=True)
class CourseLine:
    """A row of continual.csv: test accuracy on one task after another, both counted from 0."""

    row: Row
    head: HeadName
    after: Annotated[int, Interval(ge=0, lt=10**4)]
    task: Annotated[int, Interval(ge=0, lt=10**4)]
    accuracy: Annotated[float, Interval(ge=0, le=1)] | Literal[""]


def courses(apart: Apart) -> dict[tuple[str, str], Course]:
    """Measure every row with every head, on the test images; the model ends as the sequential row's last one."""
    onward, alone = apart.vectors(AFTER), apart.vectors()
    tasks = range(1, len(apart.units) + 1)
    found: dict[tuple[str, str], list[Floats]] = {}
    for row in reversed(ROWS):  # so that the sequential one is the last
        say(apart.session.console, f"measuring {row}, after each of {len(tasks)} tasks")
        for seen in tasks:
            if row == "sequential":
                theta = apart.start + onward[seen - 1].values.to(apart.start.device)
            else:
                merged = merge(onward[:seen] if row == "magmax" else alone[:seen], row)
                _set(apart, apart.start)
                alpha = factor(apart.loaded, merged, _of_seen(apart, seen))
                theta = apart.start + scaled(merged.values, alpha).to(apart.start.device)
            for head, accuracy in _measured(apart, theta, seen).items():
                found.setdefault((row, head), []).append(accuracy)
    order = [(row, head) for row in ROWS for head in HEADS if (row, head) in found]
    return {key: Course(np.stack(found[key])) for key in order}


def _measured(apart: Apart, theta: Tensor, seen: int) -> dict[str, Floats]:
    """Accuracy of each task (T,) at these values: with the first head, and with that of the clients met so far."""
    loaded = apart.loaded
    accuracy = partial(task_accuracy, loaded.model, loaded.limited("test"), apart.groups, loaded.features)
    _set(apart, theta)
    found = {"first": accuracy().unknown}
    if apart.config.apart.refit_head:
        apart.refit(apart.units[:seen])
        found["refitted"] = accuracy().unknown
    return found


def _set(apart: Apart, theta: Tensor) -> None:
    """Give the model the first head, then these values (A,): where the head moves, theirs."""
    set_head(apart.loaded.model, *apart.head, source=apart.loaded.model.head_source)
    apart.moving.write(theta)


def _of_seen(apart: Apart, seen: int) -> LabelledImages:
    """Validation images of the tasks met so far, to choose factors by."""
    val = apart.loaded.limited("val")
    classes = torch.tensor(sorted(label for group in apart.groups[:seen] for label in group))
    return val.subset(torch.isin(val.labels, classes.to(val.labels.device)).nonzero().squeeze(1))


def write_courses(found: dict[tuple[str, str], Course], apart: Apart, console: Console) -> dict[str, Any]:
    """Write continual.csv, print average accuracy and backward transfer, and return these for the summary."""
    rows = [
        {"row": row, "head": head, "after": after, "task": task, "accuracy": cell(value)}
        for (row, head), course in found.items()
        for (after, task), value in np.ndenumerate(course.accuracy)
    ]
    write_csv(apart.session.paths.results / FILE, rows)
    table = Table(box=None, title="test %, the task unknown", title_justify="left")
    for heading in ("", "head", "average accuracy", "backward transfer"):
        table.add_column(heading, justify="left" if heading in ("", "head") else "right")
    summary: dict[str, Any] = {}
    for (row, head), course in found.items():
        average, transfer = course.average_accuracy, course.backward_transfer
        table.add_row(row, head, f"{100 * average:.1f}", f"{100 * transfer:+.1f}")
        figures = {"average_accuracy": round(average, 6), "backward_transfer": round(transfer, 6)}
        summary.setdefault(row, {})[head] = figures
    console.print(table, highlight=False)
    return {"continual": summary}


def read_courses(run_dir: Path) -> dict[tuple[str, str], Course]:
    """Read a run's continual.csv, the course of each row and head; nothing where there is none.

    Raises InputError where it cannot be read, or a course lacks a cell.
    """
    path = run_dir / FILE
    if not path.is_file():
        return {}
    _, lines = read_table(CourseLine, path)
    cells: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for line in lines:
        cells.setdefault((line.row, line.head), {})[line.after, line.task] = known(line.accuracy)
    found = {}
    for key, values in cells.items():
        tasks = range(max(map(max, values)) + 1)
        if len(values) != len(tasks) ** 2:
            got = f"got {len(values)} rows of {' '.join(key)} for {len(tasks)} tasks"
            raise InputError(f"{path}: expected every task after every task, {got}; make the run anew")
        found[key] = Course(np.array([[values[after, task] for task in tasks] for after in tasks]))
    return found
