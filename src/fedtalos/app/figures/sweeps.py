"""Figures of a grid: mean over seeds in a band of one standard deviation, a panel per split, a line per method.

Importing this module takes up to a second: import it late.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedtalos.app.figures.records import History
from fedtalos.app.figures.style import look, megabyte_axis, new_figure, plain, whole_numbers
from fedtalos.metrics import wilson

PANELS_A_ROW = 3


@dataclass(frozen=True)
class Line:
    """One method in one panel: its runs' metrics, one per seed, and mean and deviation of their test accuracy (%)."""

    panel: str
    method: str
    histories: Sequence[History]
    test_mean: float
    test_std: float
    tested: int = 0
    """Images that a run was tested on; 0 where not known."""


@dataclass(frozen=True)
class Curve:
    """Validation accuracy (%) at the steps that all seeds have: mean and sample deviation over seeds, (S,) each."""

    steps: np.ndarray
    megabytes: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def curve(histories: Sequence[History]) -> Curve:
    """Average runs of several seeds; the deviation of one run is nan."""
    runs = [{row.step: row for row in h.rows if row.split == "val" and math.isfinite(row.accuracy)} for h in histories]
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    values = np.array([[100 * run[step].accuracy for step in steps] for run in runs])
    sent = np.array([[run[step].megabytes for step in steps] for run in runs])
    std = values.std(0, ddof=1) if len(runs) > 1 else np.full(len(steps), math.nan)
    return Curve(np.array(steps), sent.mean(0), values.mean(0), std)


def by_step(lines: Sequence[Line], title: str) -> Figure:
    """Draw validation accuracy by round or epoch."""
    names = sorted({history.step_name for line in lines for history in line.histories}, reverse=True)

    def step(curve: Curve) -> np.ndarray:
        return curve.steps

    figure, panels = _panels(lines, title, step, " or ".join(names))
    for axes in panels:
        axes.xaxis.set_major_locator(whole_numbers(6))
    return figure


def by_megabytes(lines: Sequence[Line], title: str) -> Figure:
    """Draw validation accuracy against megabytes sent by all clients together."""

    def sent(curve: Curve) -> np.ndarray:
        return curve.megabytes

    figure, panels = _panels(lines, title, sent, "sent up and down (MB)")
    totals = [history.rows[-1].megabytes for line in lines for history in line.histories]
    for axes in panels:
        megabyte_axis(axes, min(totals), max(totals), narrow=len(panels) > 2)
    return figure


def final(lines: Sequence[Line], title: str) -> Figure:
    """Draw test accuracy at the end with bars of one standard deviation, panels side by side along x.

    Where every run has one seed, bars are 95 % intervals by the test images.
    """
    panels, methods = _names(lines)
    single = all(len(line.histories) == 1 for line in lines)
    figure = new_figure(3.8)
    axes = figure.subplots()
    for index, method in enumerate(methods):
        colour, marker = look(index)
        mine = [line for line in lines if line.method == method]
        offset = (index - (len(methods) - 1) / 2) * 0.6 / max(1, len(methods))
        axes.errorbar(
            [panels.index(line.panel) + offset for line in mine],
            [line.test_mean for line in mine],
            np.array([_bar(line, single=single) for line in mine]).T,
            linestyle="",
            marker=marker,
            color=colour,
            capsize=3,
            markersize=5,
        )
    axes.set_xticks(range(len(panels)), labels=[panel or "all" for panel in panels], parse_math=False)
    axes.set(xlim=(-0.6, len(panels) - 0.4), ylabel="test accuracy (%)")
    plain(axes)
    axes.grid(visible=False, axis="x")
    bars = "bars: 95 % interval by the test images" if single else "bars: one standard deviation"
    _legend(figure, methods, title, f"{_seeds(lines)}; {bars}")
    return figure


def _panels(
    lines: Sequence[Line], title: str, x: Callable[[Curve], np.ndarray], label: str
) -> tuple[Figure, list[Axes]]:
    panels, methods = _names(lines)
    columns = min(len(panels), PANELS_A_ROW) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(0.8 + 2.6 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for unused in grid.flat[len(panels) :]:
        unused.set_axis_off()
    shown = list(grid.flat[: len(panels)])
    for axes, panel in zip(shown, panels, strict=True):
        for line in (line for line in lines if line.panel == panel):
            colour, marker = look(methods.index(line.method))
            drawn = curve(line.histories)
            axes.plot(x(drawn), drawn.mean, color=colour, marker=marker, markersize=3)
            if len(line.histories) > 1:
                band = (drawn.mean - drawn.std, drawn.mean + drawn.std)
                axes.fill_between(x(drawn), *band, color=colour, alpha=0.2, linewidth=0)
        if len(panels) > 1:
            axes.set_title(panel, fontsize="medium", parse_math=False)
        axes.tick_params(labelbottom=True)
        plain(axes)
    for axes in shown[-columns:]:  # the lowest of each column
        axes.set_xlabel(label)
    for axes in grid[:, 0]:
        axes.set_ylabel("validation accuracy (%)")
    many = any(len(line.histories) > 1 for line in lines)
    _legend(figure, methods, title, _seeds(lines) + ("; band: one standard deviation" if many else ""))
    return figure, shown


def _names(lines: Sequence[Line]) -> tuple[list[str], list[str]]:
    """List panels and methods in the order of the grid."""
    return list(dict.fromkeys(line.panel for line in lines)), list(dict.fromkeys(line.method for line in lines))


def _seeds(lines: Sequence[Line]) -> str:
    """Say of how many seeds a line is the mean."""
    counts = sorted({len(line.histories) for line in lines})
    if counts == [1]:
        return "one seed"
    return f"mean of n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"


def _bar(line: Line, *, single: bool) -> tuple[float, float]:
    """Lengths of a bar below and above a test accuracy (%)."""
    if not single:
        std = 0.0 if math.isnan(line.test_std) else line.test_std
        return std, std
    low, high = wilson(line.test_mean / 100, line.tested)
    return (0.0, 0.0) if math.isnan(low) else (line.test_mean - 100 * low, 100 * high - line.test_mean)


def _legend(figure: Figure, methods: Sequence[str], title: str, note: str) -> None:
    """Name the lines below the axes, under a ``note`` of what they are."""
    looks = [look(index) for index in range(len(methods))]
    handles = [Line2D([], [], color=colour, marker=marker, markersize=4) for colour, marker in looks]
    columns = max(1, min(len(methods), 90 // (max(map(len, methods)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.22 * (1 + math.ceil(len(methods) / columns)))
    legend = figure.legend(
        handles,
        list(methods),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        title=note,
        title_fontsize="small",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.suptitle(title, parse_math=False)
