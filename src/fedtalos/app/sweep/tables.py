"""Tables of a grid's results: a line per run, and mean and standard deviation over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedtalos.app.config.files import read_yaml
from fedtalos.app.run.recorder import write_csv
from fedtalos.app.sweep.grid import Cell
from fedtalos.errors import InputError
from fedtalos.files import write_atomic

COLUMNS = {
    "test_percent": "test (%)",
    "test_best_percent": "best on val",
    "val_percent": "val (%)",
    "megabytes": "sent (MB)",
    "seconds": "time (s)",
    "images": "images",
}
"""Columns of the CSV files -> headings for people; test and val are the last model's, images are those trained on."""


@dataclass(frozen=True)
class Result:
    """A finished run: its values by column (nan where it has none), and the commit of the code that made it."""

    cell: Cell
    values: dict[str, float]
    commit: str


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (nan of a single one) of n values; values that are nan are left out."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        known = [value for value in values if not math.isnan(value)]
        mean = fmean(known) if known else math.nan
        return cls(mean, stdev(known) if len(known) > 1 else math.nan, len(known))


@dataclass(frozen=True)
class Row:
    """The runs of one combination of axis values, over seeds."""

    results: list[Result]
    spreads: dict[str, Spread]

    @property
    def cell(self) -> Cell:
        """One of the runs; they differ by their seed only."""
        return self.results[0].cell


def read_result(cell: Cell) -> Result:
    """Read a finished run's records. InputError where they are broken."""
    summary, config = read_yaml(cell.paths.results / "summary.yaml"), read_yaml(cell.paths.config)
    try:
        accuracies = {
            "test_percent": summary.get("test_accuracy", {}).get("last"),
            "test_best_percent": summary.get("test_accuracy", {}).get("best_on_val"),
            "val_percent": summary.get("val_accuracy", {}).get("last"),
        }
        values = {name: math.nan if share is None else 100 * share for name, share in accuracies.items()}
        values["megabytes"] = float(sum(summary.get("megabytes_sent", {}).values()))
        values["seconds"] = float(summary["seconds"])
        values["images"] = float(summary.get("images_trained_on", 0))
        return Result(cell, values, str(config["made_by"]["commit"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{cell.paths.results}: its summary.yaml or config.yaml is broken; make the run anew"
        ) from error


def over_seeds(results: Sequence[Result]) -> list[Row]:
    """Put the runs of each combination of axis values in one row, in the order of the grid."""
    same: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        same.setdefault((result.cell.config.command, result.cell.label), []).append(result)
    return [
        Row(those, {name: Spread.of([result.values[name] for result in those]) for name in COLUMNS})
        for those in same.values()
    ]


def write_tables(results: Sequence[Result], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write cells.csv, a line per run, and table.csv and table.md, a line per combination; return the files."""
    axes = list(dict.fromkeys(axis for row in rows for axis in row.cell.point))
    write_csv(folder / "cells.csv", [_cell_line(result, axes) for result in results])
    write_csv(folder / "table.csv", [_table_line(row, axes) for row in rows])
    header, *lines = table_lines(rows)
    text = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]
    write_atomic(folder / "table.md", "\n".join(text) + "\n")
    return [folder / name for name in ("cells.csv", "table.csv", "table.md")]


def print_table(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print a line per row, with fewer columns than table.md has: a terminal is narrow, and may not know ±."""

    def shown_as(text: str) -> str:
        try:
            text.encode(console.encoding)
        except UnicodeEncodeError:
            return text.replace("±", "+-")
        return text

    table = Table(title=shown_as(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    shown = [name for name in COLUMNS if name != "images"]
    for header in ("seeds", *(COLUMNS[name] for name in shown)):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = [shown_as(_spread(name, row.spreads[name])) for name in shown]
        table.add_row(row.cell.label or row.cell.config.command, str(len(row.results)), *cells)
    console.print(table)


def table_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Make a header and a line per row: command, value on each axis, seeds, and mean ± deviation of every column."""
    axes = list(dict.fromkeys(axis for row in rows for axis in row.cell.point))
    lines = [["run", *axes, "seeds", *COLUMNS.values()]]
    for row in rows:
        cell = row.cell
        kind = cell.config.command if cell.point else f"{cell.config.command} ({cell.label})"
        cells = [_spread(name, row.spreads[name]) for name in COLUMNS]
        lines.append([kind, *(cell.point.get(axis, "") for axis in axes), str(len(row.results)), *cells])
    return lines


def _spread(name: str, spread: Spread) -> str:
    """Write accuracies with their deviation, costs as a mean."""
    if math.isnan(spread.mean) or (name in ("megabytes", "images") and spread.mean == 0):
        return ""
    if name.endswith("percent"):
        return f"{spread.mean:.1f}" if math.isnan(spread.std) else f"{spread.mean:.1f} ± {spread.std:.1f}"
    return f"{spread.mean:,.{1 if name == 'megabytes' and spread.mean < 100 else 0}f}".replace(",", " ")


def _cell_line(result: Result, axes: Sequence[str]) -> dict[str, Any]:
    cell = result.cell
    return {
        "run": cell.name,
        "command": cell.config.command,
        **{axis: cell.point.get(axis, "") for axis in axes},
        "seed": cell.seed,
        **{name: _number(value) for name, value in result.values.items()},
        "commit": result.commit,
    }


def _table_line(row: Row, axes: Sequence[str]) -> dict[str, Any]:
    spreads = {
        f"{name}_{what}": _number(value)
        for name, spread in row.spreads.items()
        for what, value in (("mean", spread.mean), ("std", spread.std))
    }
    point = {axis: row.cell.point.get(axis, "") for axis in axes}
    command = row.cell.config.command
    return {"command": command, "label": row.cell.label, **point, "seeds": len(row.results), **spreads}


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"
