"""tasks.csv of a run whose tasks trained apart: test accuracy of each task by each model, and what the summary says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedtalos.app.load import Loaded
from fedtalos.app.run.kept import Unit
from fedtalos.app.run.recorder import cell, write_csv
from fedtalos.models.heads import Head, head_of, set_head
from fedtalos.training.editing.disentanglement import normalised_accuracy
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.task_accuracy import Floats, TaskAccuracy, task_accuracy


def write_task_table(
    loaded: Loaded[Any],
    moving: MaskedParameters,
    units: Sequence[Unit],
    start: Tensor,
    head: Head,
    merged: Tensor,
    vectors: Sequence[TaskVector],
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    """Measure the start, each single vector, and the merged model, on the test images of every task; write and print.

    ``start`` (A,) and ``head`` are what the vectors started from, ``merged`` (A,) is what they came to before the head
    was fitted anew. The model, refitted or not, is left as it was. Returns means over the tasks.
    """
    model, images = loaded.model, loaded.limited("test")
    groups = tuple(unit.classes for unit in units)
    now, fitted, source = moving.vector(), head_of(model), model.head_source
    refitted = task_accuracy(model, images, groups, loaded.features)
    set_head(model, *head, source=source)

    def measured(theta: Tensor) -> TaskAccuracy:
        moving.write(theta)
        return task_accuracy(model, images, groups, loaded.features)

    kept, base = measured(merged), measured(start)
    singles = [measured(start + vector.values.to(start.device)) for vector in vectors]
    set_head(model, *fitted, source=source)
    moving.write(now)
    columns: dict[str, Floats] = {
        "base": base.unknown,
        "base_known": base.known,
        "single": np.array([single.unknown[number] for number, single in enumerate(singles)]),
        "single_known": np.array([single.known[number] for number, single in enumerate(singles)]),
        "merged": kept.unknown,
        "merged_known": kept.known,
        "refitted": refitted.unknown,
        "refitted_known": refitted.known,
    }
    rows = [
        {"task": unit.name, "classes": len(unit.classes)}
        | {name: cell(values[number]) for name, values in columns.items()}
        for number, unit in enumerate(units)
    ]
    write_csv(folder / "tasks.csv", rows)
    means = {name: round(float(np.nanmean(values)), 6) for name, values in columns.items()}
    _print(rows, means, console)
    normalised = normalised_accuracy(columns["merged_known"].tolist(), columns["single_known"].tolist())
    return {"task_accuracy": {**means, "normalised": round(normalised, 6)}}


def _print(rows: Sequence[dict[str, Any]], means: dict[str, float], console: Console) -> None:
    """Print test accuracies in percent: unknown / known."""
    table = Table(box=None, title="test % on each task, the task unknown / known", title_justify="left")
    for heading in ("task", "base", "single", "merged", "refitted"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for row in [*rows, {"task": "mean", **means}]:
        cells = [
            " / ".join("-" if row[name] == "" else f"{100 * float(row[name]):.1f}" for name in (what, f"{what}_known"))
            for what in ("base", "single", "merged", "refitted")
        ]
        table.add_row(str(row["task"]), *cells)
    console.print(table, highlight=False)
