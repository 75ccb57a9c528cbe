"""A sweep's report: a line per combination of axis values, over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from fedtalos.app.report.contents import Method, Report, read_records
from fedtalos.app.sweep.grid import MOST_RUNS, Cell, expand, read_grid
from fedtalos.app.sweep.tables import Result, over_seeds, read_result
from fedtalos.errors import InputError
from fedtalos.facts import read_table, table_schema


@table_schema
@dataclass(frozen=True)
class _CellLine:
    """The column of cells.csv that says which runs there are."""

    seed: Annotated[int, Interval(ge=0, le=2**62)]


def read_grid_results(folder: Path) -> tuple[str, list[Result]]:
    """Read what a sweep's finished runs left, as its grid has them now, from its folder of results.

    Raises InputError where there is no such grid, or none of its runs is finished.
    """
    root, name = folder.resolve().parents[1], folder.resolve().name
    advice = f"`fedtalos sweep {name}` makes it anew"
    _, lines = read_table(_CellLine, folder / "cells.csv", most_bytes=2**24, most_rows=MOST_RUNS, advice=advice)
    seeds = sorted({line.seed for line in lines})
    cells = expand(name, read_grid(name), {"output_dir": str(root)}, seeds)
    results = [read_result(cell) for cell in cells if cell.paths.finished]
    if not results:
        raise InputError(
            f"{folder}: no run of the grid {name!r} is finished in {root / 'results'}; `fedtalos sweep` runs it"
        )
    return name, results


def report_of_grid(name: str, results: Sequence[Result]) -> Report:
    """Gather the report of a sweep's training runs; edits have no accuracy and are left out.

    Raises InputError where it has none.
    """
    rows = [row for row in over_seeds(results) if is_training(row.cell)]
    if not rows:
        raise InputError(f"report: {name} has no finished training runs")
    methods = [
        Method(row.cell.label, [read_records(result.cell.paths) for result in row.results], row.cell.point)
        for row in rows
    ]
    axes: dict[str, list[str]] = {}
    for method in methods:
        for axis, value in method.point.items():
            axes.setdefault(axis, [])
            axes[axis] += [value] if value not in axes[axis] else []
    return Report(name, methods, {axis: values for axis, values in axes.items() if len(values) > 1})


def is_training(cell: Cell) -> bool:
    """Tell whether a cell trains a model, which has accuracies; edits have none."""
    return cell.config.command in ("centralized", "federated")
