"""Figure of continual learning: what is known, and what is left of the first task, as tasks come.

Importing this module takes up to a second: import it late.
"""

from collections.abc import Mapping
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedtalos.app.figures.style import COLOURS, new_figure, plain, whole_numbers
from fedtalos.training.federated.continual import Course

_DASHES: dict[str, Literal["-", "--"]] = {"refitted": "-", "first": "--"}


def courses(found: Mapping[tuple[str, str], Course], name: str) -> Figure:
    """Draw test accuracy (%) by tasks learnt: over all of these, and on the first; a line for each row and head."""
    figure = new_figure(3.6)
    over_all, on_first = figure.subplots(1, 2, sharey=True)
    rows = list(dict.fromkeys(row for row, _ in found))
    for (row, head), course in found.items():
        for axes, accuracy in ((over_all, course.so_far), (on_first, course.accuracy[:, 0])):
            numbers = range(1, len(accuracy) + 1)
            number = rows.index(row)  # later rows have smaller points, so that equal ones are seen behind them
            points = {"marker": "o", "markersize": 3.5 + 2 * (len(rows) - number), "markerfacecolor": "white"}
            axes.plot(numbers, 100 * accuracy, _DASHES[head], color=COLOURS[number], **points)
    over_all.set(
        ylabel="test accuracy (%), task unknown",
        title="mean over the tasks learnt",
        ylim=(0, 1.05 * over_all.get_ylim()[1]),
    )
    on_first.set(title="on the first task")
    for axes in (over_all, on_first):
        axes.set(xlabel="tasks learnt")
        axes.xaxis.set_major_locator(whole_numbers(10))
        plain(axes)
    handles = [Line2D([], [], color=COLOURS[number], label=row) for number, row in enumerate(rows)]
    dashes = {head: _DASHES[head] for _, head in found}
    handles += [Line2D([], [], color="#555555", linestyle=dash, label=f"{head} head") for head, dash in dashes.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"One task after another\n{name}", parse_math=False)
    return figure
