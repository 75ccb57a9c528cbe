"""Figures of a grid: the last axis becomes lines, the one before it panels, and every value of others a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.config.tools import FigureFormat
from fedtalos.app.figures import sweeps as sweep_figures
from fedtalos.app.figures.draw import write_figures
from fedtalos.app.figures.records import FEW, read_history
from fedtalos.app.figures.style import MOST_LINES
from fedtalos.app.figures.sweeps import Line
from fedtalos.app.run.split_file import split_title
from fedtalos.app.sweep.grid import Cell
from fedtalos.app.sweep.tables import Result, over_seeds
from fedtalos.errors import InputError


@dataclass(frozen=True)
class Place:
    """Place of a run: its line, its panel, and its values on the axes before those two, which choose the figure."""

    method: str
    panel: str
    apart: frozenset[tuple[str, str]]


def place(cell: Cell) -> Place | None:
    """Find where a run is drawn; None where it is not, for it has no axes, or no accuracy."""
    if not cell.point or cell.config.command == "editing":
        return None
    *before, method = cell.point.values()
    panel = before[-1] if before else ""
    return Place(method, panel, frozenset(list(cell.point.items())[:-2]))


def check_lines(cells: Sequence[Cell]) -> None:
    """Raise InputError where the last axis has more values than there are lines that look different."""
    methods = {where.method for cell in cells if (where := place(cell)) is not None}
    if len(methods) > MOST_LINES:
        raise InputError(
            f"the last axes of the grid have {len(methods)} values, which are the lines of its figures; colours tell "
            f"{MOST_LINES} apart: put another axis last"
        )


def check_data(cells: Sequence[Cell]) -> None:
    """Raise InputError where one panel would hold lines of several data sets."""
    known: dict[tuple[str, frozenset[tuple[str, str]]], tuple[str, str]] = {}
    for cell in cells:
        if (where := place(cell)) is None:
            continue
        data = cell.config.data
        images = (data.dataset, str(data.data_dir) if data.dataset in ("folder", "csv") else "")
        first = known.setdefault((where.panel, where.apart), images)
        if first != images:
            names = " and ".join(" ".join(words).strip() for words in (first, images))
            raise InputError(
                f"the grid has lines of {names} in one figure, whose accuracies are not to be read on one axis; put an "
                "axis of data sets before the last"
            )


def plot_grid(
    name: str,
    results: Sequence[Result],
    plots_dir: Path,
    names: Mapping[str, str] | None = None,
    form: FigureFormat = "png",
) -> list[Path]:
    """Draw accuracy_by_round.png (or epoch), megabytes.png and final.png into ``plots_dir``; return the files.

    ``names`` are plain ones for values of axes. Three points or fewer are not drawn: the table says as much.
    Where runs have further axes, there is one of each for every combination of their values, named by them; a run
    that lacks an axis is in all of its figures.
    """
    lines = _lines(results, names or {})
    drawn = {}
    for part, those in _by_figure(lines).items():
        if len(those) > FEW:
            drawn[f"final{part}"] = sweep_figures.final(those, f"{name}{part}: test accuracy at the end")
    for unit in ("round", "epoch"):
        of_unit = [(where, line) for where, line in lines if line.histories[0].step_name == unit]
        for part, those in _by_figure(of_unit).items():
            if all(history.points <= FEW for line in those for history in line.histories):
                continue
            drawn[f"accuracy_by_{unit}{part}"] = sweep_figures.by_step(those, f"{name}{part}: accuracy by {unit}")
            if unit == "round":
                drawn[f"megabytes{part}"] = sweep_figures.by_megabytes(those, f"{name}{part}: accuracy by bytes sent")
    return write_figures(drawn, plots_dir, form)


def _lines(results: Sequence[Result], names: Mapping[str, str]) -> list[tuple[Place, Line]]:
    lines, titles = [], _panel_titles(results)
    for row in over_seeds(results):
        where = place(row.cell)
        if where is None:
            continue
        histories = [read_history(result.cell.paths.results) for result in row.results]
        test, panel = row.spreads["test_percent"], titles.get(where.panel, names.get(where.panel, where.panel))
        tested = max((at.examples for at in histories[0].rows if at.split == "test"), default=0)
        method = names.get(where.method, where.method)
        lines.append((where, Line(panel, method, histories, test.mean, test.std, tested)))
    return lines


def _panel_titles(results: Sequence[Result]) -> dict[str, str]:
    """Plain names of panels that are splits, such as "IID"; none where they differ in something else, too."""
    splits: dict[str, set[str]] = {}
    for cell in (result.cell for result in results):
        where = place(cell)
        if where is not None and isinstance(cell.config, FederatedConfig):
            split = cell.config.split
            title = split_title(split.partition, split.classes_per_client, split.alpha)
            splits.setdefault(where.panel, set()).add(title)
    titles = {title for those in splits.values() for title in those}
    plain = len(titles) == len(splits) > 1 and all(len(those) == 1 for those in splits.values())
    return {panel: next(iter(those)) for panel, those in splits.items()} if plain else {}


def _by_figure(lines: Sequence[tuple[Place, Line]]) -> dict[str, list[Line]]:
    """Sort lines into figures, by the part of a figure's name: one for all values that no other's values include."""
    every = dict.fromkeys(where.apart for where, _ in lines)
    largest = [apart for apart in every if not any(apart < other for other in every)]
    parts = {apart: "".join(f"-{value}" for _, value in sorted(apart)) for apart in largest}
    return {part: [line for where, line in lines if where.apart <= apart] for apart, part in parts.items()}
