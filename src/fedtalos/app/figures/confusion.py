"""Figure of a confusion matrix: which class was taken for which, and the most frequent mistakes.

Importing this module takes up to a second: import it late.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fedtalos.app.figures.style import COLOURS, drawable, new_figure, plain, whole_numbers
from fedtalos.training.confusion import Confusion

NAMED = 20
"""Most classes whose names have room beside the matrix, and whose cells have room for a number."""
PAIRS = 12
"""Mistakes that are listed."""
_CELLS = LinearSegmentedColormap.from_list("white to blue", ["#FFFFFF", "#0072B2", "#00263B"])


def confusion_figure(found: Confusion, classes: Sequence[str], title: str) -> Figure:
    """Draw the share of each class's images (%) by answer, white for none, and the most frequent mistakes as bars.

    A class without images has a grey row.
    """
    figure = new_figure(4.6 if len(classes) > NAMED else max(3.4, 1.6 + 0.24 * len(classes)))
    mistakes = found.most_confused(PAIRS)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1)) if mistakes else (figure.subplots(), None)
    names = [_short(drawable(name)) for name in classes]
    _matrix(left, found, names, figure)
    if right is not None:
        _bars(right, [(f"{names[true]} > {names[answer]}", count) for true, answer, count in mistakes])
    metrics = found.metrics
    figure.suptitle(
        drawable(f"{title}: {metrics.correct} of {metrics.examples} right, {100 * metrics.accuracy:.1f} %"),
        parse_math=False,
    )
    return figure


def _matrix(axes: Axes, found: Confusion, names: Sequence[str], figure: Figure) -> None:
    counts = found.counts.numpy()
    images = counts.sum(1, keepdims=True)
    shares = np.where(images > 0, 100 * counts / np.maximum(images, 1), np.nan)
    axes.set_facecolor("#DDDDDD")
    image = axes.imshow(shares, cmap=_CELLS, vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="answer", ylabel="true class")
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), labels=names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(names)), labels=names, fontsize=8, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                ink = "white" if shares[row, column] > 50 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=ink, fontsize=7)
    else:
        axes.xaxis.set_major_locator(whole_numbers(6))
        axes.yaxis.set_major_locator(whole_numbers(6))
        axes.set(xlabel="answer (number of the class)", ylabel="true class (number)")
    figure.colorbar(image, ax=axes, label="of the class's images (%)", shrink=0.8, pad=0.02)


def _bars(axes: Axes, mistakes: Sequence[tuple[str, int]]) -> None:
    at = range(len(mistakes))
    axes.barh(at, [count for _, count in mistakes], color=COLOURS[1], height=0.7)
    axes.set_yticks(at, labels=[label for label, _ in mistakes], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel="images", title="most frequent: true > answer")
    axes.title.set_fontsize(10)
    axes.xaxis.set_major_locator(whole_numbers(5))
    plain(axes)
    axes.grid(visible=False, axis="y")


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:14]}.."
