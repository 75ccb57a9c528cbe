"""Figures of runs and masks from plain data: each function draws one matplotlib Figure.

Cells are one blue, from light or white to dark. Importing this module takes up to a second: import it late.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from fedtalos.app.figures.records import History, Quantity, Row
from fedtalos.app.figures.style import (
    COLOURS,
    MARKERS,
    MOST_LINES,
    look,
    megabyte_axis,
    new_figure,
    plain,
    whole_numbers,
)
from fedtalos.metrics import wilson
from fedtalos.training.editing.describe import KINDS, DensityRow

MOST_RUNS = MOST_LINES
_GREY = "#555555"
CELLS = LinearSegmentedColormap.from_list("blue", ["#C2DBED", "#0072B2", "#00263B"])
_SHARES = LinearSegmentedColormap.from_list("white to blue", ["#FFFFFF", "#9CC9E5", "#0072B2", "#00263B"])
_FEW = 25  # longer lines do not mark every point


def _step(row: Row) -> float:
    return row.step


def _sent(row: Row) -> float:
    return row.megabytes


def _per_cent(row: Row) -> float:
    return 100 * row.accuracy


def curves(histories: Sequence[History]) -> Figure:
    """Draw accuracy (%) and cross-entropy by round or epoch: train dashed, validation solid, test a marker at the end.

    The test accuracy has its 95 % interval.

    Beyond four runs the training lines are left out: they would hide the rest.
    """
    splits = ("train", "val", "test") if len(histories) <= 4 else ("val", "test")
    steps = sorted({history.step_name for history in histories}, reverse=True)
    figure = new_figure(3.4)
    left, right = figure.subplots(1, 2)
    for axes, label, y in ((left, "accuracy (%)", _per_cent), (right, "cross-entropy (nats)", lambda row: row.loss)):
        for index, history in enumerate(histories):
            _draw_run(axes, history, index, splits, _step, y)
            if axes is left:
                _draw_intervals(axes, history, index, _step)
        axes.set(xlabel=" or ".join(steps), ylabel=label)
        axes.xaxis.set_major_locator(whole_numbers(8))
        plain(axes)
    _legend_of_splits(left, histories)
    _title(figure, f"Accuracy and loss by {' or '.join(steps)}", histories)
    return figure


def megabytes(histories: Sequence[History]) -> Figure:
    """Draw validation accuracy (%) against megabytes sent, test a marker at the end, with its 95 % interval.

    x is on a log scale where the runs' totals lie far apart.
    """
    figure = new_figure(3.8)
    axes = figure.subplots()
    for index, history in enumerate(histories):
        _draw_run(axes, history, index, ("val", "test"), _sent, _per_cent)
        _draw_intervals(axes, history, index, _sent)
    totals = [np.nanmax([row.megabytes for row in history.rows]) for history in histories]
    megabyte_axis(axes, min(totals), max(totals))
    axes.set(xlabel="sent up and down, all clients (MB)", ylabel="accuracy (%)")
    plain(axes)
    _legend_of_splits(axes, histories)
    _title(figure, "Accuracy against megabytes sent", histories)
    return figure


def clients(class_counts: npt.NDArray[np.int64], classes: Sequence[str], title: str) -> Figure:
    """Draw how many images of each class each client holds, from counts (K, C); name classes where there is room."""
    num_classes = len(classes)
    figure = new_figure(float(np.clip(1.2 + 0.22 * num_classes, 2.8, 5.0)))
    axes = figure.subplots()
    counts = np.ma.masked_equal(class_counts.T, 0)
    image = axes.imshow(counts, cmap=CELLS, vmin=0, aspect="auto", interpolation="nearest")
    axes.set(xlabel="client", ylabel="class")
    axes.xaxis.set_major_locator(whole_numbers(20 if len(class_counts) <= 20 else 10))
    if num_classes <= 20:
        axes.set_yticks(range(num_classes), labels=classes, parse_math=False)
    figure.colorbar(image, ax=axes, label="images (white: none)", pad=0.02)
    axes.set_title(title, parse_math=False)
    return figure


def density(rows: Sequence[DensityRow], title: str) -> Figure:
    """Draw the share of entries that may move (%) by block and kind of tensor: white is none, on one scale to 100 %."""
    blocks, places = zip(*sorted({(row.block, row.place) for row in rows}), strict=True)
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    shares = np.full((len(blocks), len(kinds)), np.nan)
    for row in rows:
        shares[blocks.index(row.block), kinds.index(row.kind)] = 100 * row.density
    figure = new_figure(max(2.8, 1.3 + 0.3 * len(blocks)))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap=_SHARES, vmin=0, vmax=100, aspect="auto")  # one scale for all masks
    axes.set_xticks(range(len(kinds)), labels=kinds)
    axes.set_yticks(range(len(blocks)), labels=places)
    _cell_borders(axes, *shares.shape)
    axes.set(xlabel="kind of tensor", ylabel="block")
    annotate(axes, image, shares, "{:.1f}")
    figure.colorbar(image, ax=axes, label="entries that may move (%)", pad=0.02)
    axes.set_title(title, parse_math=False)
    return figure


def iterations(report: Mapping[int, Sequence[DensityRow]], name: str) -> Figure:
    """Draw the share of entries that may move (%) after each iteration, by kind of tensor.

    ``report`` maps each iteration's number to its density rows.
    """
    figure = new_figure(3.8)
    axes = figure.subplots()
    numbers = [0, *report]

    def shares(*kinds: str) -> list[float]:
        chosen = [[row for row in rows if row.kind in kinds] for rows in report.values()]
        return [100.0, *(100 * sum(r.active for r in rows) / sum(r.entries for r in rows) for rows in chosen)]

    kinds = [kind for kind in KINDS if any(row.kind == kind for rows in report.values() for row in rows)]
    colours = (*COLOURS, _GREY)
    for number, kind in enumerate(kinds):
        colour, marker = colours[number % len(colours)], MARKERS[number // len(colours)]
        axes.plot(numbers, shares(kind), color=colour, marker=marker, markersize=4, label=kind)
    axes.plot(numbers, shares(*kinds), color=_GREY, linestyle="--", linewidth=1, label="all")
    axes.set(xlabel="iteration", ylabel="entries that may move (%)", ylim=(0, None))
    axes.xaxis.set_major_locator(whole_numbers(10))
    plain(axes)
    figure.legend(loc="outside right center", frameon=False)
    axes.set_title(f"What each iteration lets move\n{name}", parse_math=False)
    return figure


def overlap(names: Sequence[str], shares: npt.NDArray[np.float64]) -> Figure:
    """Draw the intersection over union of every two masks, from a matrix (M, M) of values 0 to 1."""
    figure = new_figure(1.6 + 0.45 * len(names))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap=_SHARES, vmin=0, vmax=1, aspect="auto")
    _cell_borders(axes, *shares.shape)
    numbers = [str(number) for number in range(1, len(names) + 1)]
    axes.set_xticks(range(len(names)), labels=numbers)
    labels = [textwrap.fill(f"{number}  {name}", 28) for number, name in zip(numbers, names, strict=True)]
    axes.set_yticks(range(len(names)), labels=labels, fontsize=9, parse_math=False)
    axes.set(xlabel="mask")
    annotate(axes, image, shares, "{:.2f}")
    figure.colorbar(image, ax=axes, label="intersection over union", pad=0.02)
    axes.set_title("Overlap of the entries that may move")
    return figure


def _draw_run(axes: Axes, history: History, index: int, splits: Sequence[str], x: Quantity, y: Quantity) -> None:
    colour, marker = look(index)
    for split in splits:
        at, values = history.series(split, x, y)
        if not at:
            continue
        line = Line2D(at, values, color=colour, label=split, markersize=4, markevery=max(1, len(at) // _FEW))
        line.set_marker(marker if len(at) <= _FEW or index >= len(COLOURS) else "")
        if split == "train":
            line.set(linestyle="--", linewidth=1, alpha=0.6, markerfacecolor="white")
        elif split == "test":
            line.set(linestyle="", marker="D", markersize=7, markerfacecolor="none", markeredgewidth=1.5, zorder=3)
        axes.add_line(line)
    axes.autoscale_view()


def _draw_intervals(axes: Axes, history: History, index: int, x: Quantity) -> None:
    """Put its 95 % interval behind the test accuracy."""
    colour, _ = look(index)
    for row in history.rows:
        if row.split == "test" and row.examples and math.isfinite(row.accuracy):
            low, high = wilson(row.accuracy, row.examples)
            axes.vlines(x(row), 100 * low, 100 * high, color=colour, linewidth=1.5)
    axes.autoscale_view()


def _legend_of_splits(axes: Axes, histories: Sequence[History]) -> None:
    """Explain dashes, lines and diamonds above the axes: the first line of each split, in grey."""
    tested = sorted({row.examples for history in histories for row in history.rows if row.split == "test"})
    many = f", 95 % interval of {' or '.join(f'{n:,}'.replace(',', ' ') for n in tested)} images" if any(tested) else ""
    first = {str(line.get_label()): line for line in reversed(axes.lines)}
    signs = []
    for split in ("train", "val", "test"):
        if split in first:
            sign = Line2D([], [])
            sign.update_from(first[split])
            sign.set(color=_GREY, label={"val": "validation", "test": f"test{many}"}.get(split, split))
            signs.append(sign)
    axes.set_title(" ", fontsize="small")  # room above, where no line is; the legend may be wider than the axes
    legend = axes.legend(
        handles=signs,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(signs),
        borderaxespad=0.2,
        frameon=False,
        fontsize="small",
    )
    legend.set_in_layout(False)


def _title(figure: Figure, words: str, histories: Sequence[History]) -> None:
    """Set the title, with the name of a single run; show the colours of several below the axes."""
    labels = [_label(history) for history in histories]
    if len(histories) == 1:
        figure.suptitle(f"{words}\n{labels[0]}", parse_math=False)
        return
    figure.suptitle(words)
    looks = [look(index) for index in range(len(histories))]
    handles = [
        Line2D([], [], color=colour, marker=marker if index >= len(COLOURS) else "")
        for index, (colour, marker) in enumerate(looks)
    ]
    columns = max(1, min(len(labels), 100 // (max(map(len, labels)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(labels) / columns))
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label(history: History) -> str:
    _, tests = history.series("test", _step, _per_cent)
    return textwrap.fill(f"{history.name}: test {tests[-1]:.1f} %" if tests else history.name, 80)


def _cell_borders(axes: Axes, rows: int, columns: int) -> None:
    """Draw light lines between cells, so that white ones are seen."""
    axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, rows - 1), minor=True)
    axes.grid(which="minor", color="#DDDDDD", linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def annotate(axes: Axes, image: AxesImage, values: npt.NDArray[np.float64], form: str) -> None:
    """Write each cell's value in black or white, whichever stands out; leave a cell of nan empty.

    Nothing is written where there are so many columns that numbers would run into each other.
    """
    columns = values.shape[1]
    if columns > 14:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.to_rgba(np.array([[value]]))[0, 0]
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        axes.text(column, row, form.format(value), ha="center", va="center", color=ink, fontsize=min(9, 90 / columns))
