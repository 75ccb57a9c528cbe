"""Common look of all figures: size, colours, plain axes, and files.

Lines take Okabe and Ito's colours, which colour-blind eyes tell apart. Figures are made as objects: no pyplot, no
global settings. Importing this module takes up to a second: import it late.
"""

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedtalos.app.config.tools import FigureFormat
from fedtalos.errors import printable, shortened

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^")  # the second and third seven lines take another marker
MOST_LINES = len(COLOURS) * len(MARKERS)

_WIDTH = 8.0  # inches; 1280 pixels
_DPI = 160


def new_figure(height: float) -> Figure:
    """Make a figure of the common width, ``height`` in inches."""
    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")


def plain(axes: Axes) -> None:
    """Put a light grid behind the lines, and take the frame away."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def look(index: int) -> tuple[str, str]:
    """Colour and marker of a comparison's line number ``index``."""
    return COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS)]


def whole_numbers(most: int) -> MaxNLocator:
    """Place at most ``most`` ticks, on whole numbers."""
    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def megabyte_axis(axes: Axes, smallest_total: float, largest_total: float, *, narrow: bool = False) -> None:
    """Show x in plain megabytes, on a log scale where totals lie far apart; ``narrow`` axes have fewer ticks."""
    if largest_total > 4 * smallest_total:
        axes.set_xscale("log", nonpositive="mask")  # a round 0 that sent nothing has no place on it
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1,) if narrow and largest_total > 30 * smallest_total else (1, 3))
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def drawable(text: str, most: int = 160) -> str:
    """Replace what no font can draw, such as bytes of a file's name that are no characters, and cut long names.

    >>> drawable("caf\\udce9")
    'caf?'
    """
    return shortened(printable(text.encode("utf-8", "replace").decode()), most)


def rendered(figure: Figure, form: FigureFormat = "png") -> bytes:
    """Render a figure as a file; equal figures give equal bytes. Text in PDF and SVG stays text."""
    buffer = io.BytesIO()
    no_time = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    settings: Any = {"svg.hashsalt": "fedtalos", "svg.fonttype": "none", "pdf.fonttype": 42}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format=form, metadata=no_time[form])
    return buffer.getvalue()
