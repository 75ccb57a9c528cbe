"""Tables of a grid's results: a line per run, and mean and standard deviation over seeds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

from annotated_types import MaxLen
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedtalos.app.config.files import read_yaml
from fedtalos.app.run.recorder import write_csv
from fedtalos.app.run.units import thousands
from fedtalos.app.sweep.grid import Cell
from fedtalos.errors import printable
from fedtalos.facts import Count, Number, Share, Word, facts_from, open_schema
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


@open_schema
@dataclass(frozen=True)
class _Accuracy:
    """Accuracies that a summary states of one split."""

    last: Share | None = None
    best_on_val: Share | None = None


@open_schema
@dataclass(frozen=True)
class _Summary:
    """Figures that a summary.yaml states."""

    seconds: Number
    test_accuracy: _Accuracy = _Accuracy()
    val_accuracy: _Accuracy = _Accuracy()
    megabytes_sent: Annotated[dict[Word, Number], MaxLen(100)] = field(default_factory=dict)
    images_trained_on: Count = 0


@open_schema
@dataclass(frozen=True)
class _MadeBy:
    """Facts of a config.yaml about the code that made the run."""

    commit: Word | None


@open_schema
@dataclass(frozen=True)
class _Record:
    """Statements of a config.yaml beside its options."""

    made_by: _MadeBy


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
    path, advice = cell.paths.results / "summary.yaml", "make the run anew"
    summary = facts_from(_Summary, read_yaml(path), f"{path} is broken", advice)
    record = facts_from(_Record, read_yaml(cell.paths.config), f"{cell.paths.config} is broken", advice)
    accuracies = {
        "test_percent": summary.test_accuracy.last,
        "test_best_percent": summary.test_accuracy.best_on_val,
        "val_percent": summary.val_accuracy.last,
    }
    values = {name: math.nan if share is None else 100 * share for name, share in accuracies.items()}
    values["megabytes"] = float(sum(summary.megabytes_sent.values()))
    values["seconds"], values["images"] = summary.seconds, float(summary.images_trained_on)
    return Result(cell, values, str(record.made_by.commit))


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
    written = [[in_markdown(cell) for cell in line] for line in (header, *lines)]
    text = ["| " + " | ".join(line) + " |" for line in [written[0], ["---"] * len(header), *written[1:]]]
    write_atomic(folder / "table.md", "\n".join(text) + "\n")
    return [folder / name for name in ("cells.csv", "table.csv", "table.md")]


def in_markdown(text: str) -> str:
    """Escape what would end a cell of a table, or be more than text in it.

    >>> print(in_markdown("a|b"))
    a\\|b
    """
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", printable(text.replace("\n", " ")))


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


def cell_text(name: str, value: float) -> str:
    """One run's value in a column, as people read it; empty where it has none.

    >>> cell_text("megabytes", 1234.5)
    '1 234'
    """
    return _spread(name, Spread(value, math.nan, 1))


def _spread(name: str, spread: Spread) -> str:
    """Write accuracies with their deviation, costs as a mean."""
    if math.isnan(spread.mean) or (name in ("megabytes", "images") and spread.mean == 0):
        return ""
    if name.endswith("percent"):
        return f"{spread.mean:.1f}" if math.isnan(spread.std) else f"{spread.mean:.1f} ± {spread.std:.1f}"
    return thousands(spread.mean, 1 if name == "megabytes" and spread.mean < 100 else 0)


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
