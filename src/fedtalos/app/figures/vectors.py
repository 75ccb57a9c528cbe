"""Figures of task vectors: norms by block and kind, cosines, and weight disentanglement.

Importing this module takes up to a second: import it late.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from fedtalos.app.figures.draw import write_figures
from fedtalos.app.figures.runs import CELLS, annotate
from fedtalos.app.figures.style import drawable, new_figure
from fedtalos.training.editing.describe_vectors import VECTOR_KINDS, NormRow, cosines, norm_table
from fedtalos.training.editing.task_vectors import TaskVector

Floats = npt.NDArray[np.float64]
NAME = 40
"""Characters of a vector's name that a title or an axis has room for."""


def plot_vectors(vectors: Mapping[str, TaskVector], plots_dir: Path) -> list[Path]:
    """Draw each vector's norms, NAME_norms.png, and of two or more their cosines.png; return the files."""
    drawn = {}
    for name, vector in vectors.items():
        size = f"{vector.norm:.3g} in all, {100 * vector.density:.3g} % of the entries"
        title = f"2-norm by block and kind\n{drawable(name, NAME)}: {size}"
        drawn[f"{name}_norms"] = norms(norm_table(vector), title)
    if len(vectors) > 1:
        drawn["cosines"] = cosine_matrix([*map(drawable, vectors)], cosines(list(vectors.values())))
    return write_figures(drawn, plots_dir)


def norms(rows: Sequence[NormRow], title: str) -> Figure:
    """Draw 2-norms by block and kind of tensor."""
    blocks, places = zip(*sorted({(row.block, row.place) for row in rows}), strict=True)
    kinds = [kind for kind in VECTOR_KINDS if any(row.kind == kind for row in rows)]
    found = np.full((len(blocks), len(kinds)), np.nan)
    for row in rows:
        found[blocks.index(row.block), kinds.index(row.kind)] = row.norm
    figure = new_figure(max(2.8, 1.3 + 0.3 * len(blocks)))
    axes = figure.subplots()
    image = axes.imshow(found, cmap=CELLS, vmin=0, vmax=np.nanmax(found) or 1.0, aspect="auto")
    axes.set_xticks(range(len(kinds)), labels=kinds)
    axes.set_yticks(range(len(blocks)), labels=places)
    axes.set(xlabel="kind of tensor", ylabel="block")
    annotate(axes, image, found, "{:.2g}")
    figure.colorbar(image, ax=axes, label="2-norm", pad=0.02)
    axes.set_title(title, parse_math=False)
    return figure


def cosine_matrix(names: Sequence[str], found: Floats) -> Figure:
    """Draw the cosine of every two vectors, (V, V) from -1 to 1."""
    figure = new_figure(1.6 + 0.45 * len(names))
    axes = figure.subplots()
    image = axes.imshow(found, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    numbers = [str(number) for number in range(1, len(names) + 1)]
    axes.set_xticks(range(len(names)), labels=numbers)
    labels = [textwrap.fill(f"{number}  {name}", 28) for number, name in zip(numbers, names, strict=True)]
    axes.set_yticks(range(len(names)), labels=labels, fontsize=9, parse_math=False)
    axes.set(xlabel="vector")
    annotate(axes, image, np.round(found, 2) + 0.0, "{:.2f}")  # no -0.00
    figure.colorbar(image, ax=axes, label="cosine", pad=0.02)
    axes.set_title("Cosines between vectors")
    return figure


def disentanglement(alphas: Sequence[float], errors: Floats, first: str, second: str) -> Figure:
    """Draw weight disentanglement error by both factors, from a matrix (G, G) of values 0 to 2; light is little."""
    figure = new_figure(4.2)
    axes = figure.subplots()
    image = axes.imshow(errors, cmap=CELLS, vmin=0, vmax=max(0.1, float(errors.max())), origin="lower", aspect="auto")
    labels = [f"{alpha:g}" for alpha in alphas]
    axes.set_xticks(range(len(alphas)), labels=labels)
    axes.set_yticks(range(len(alphas)), labels=labels)
    axes.set_xlabel(f"alpha of {drawable(second, NAME)}", parse_math=False)
    axes.set_ylabel(f"alpha of {drawable(first, NAME)}", parse_math=False)
    annotate(axes, image, errors, "{:.2f}")
    figure.colorbar(image, ax=axes, label="disentanglement error (0: none, 2: most)", pad=0.02)
    axes.set_title("Weight disentanglement")
    return figure
