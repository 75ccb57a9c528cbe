"""Figure of an explanation: a photo, and what the model's answer hangs on, drawn over it.

Importing this module takes up to a second: import it late.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedtalos.app.figures.style import drawable, new_figure


@dataclass(frozen=True)
class Explained:
    """A photo, uint8 (H, H, 3), and two maps over its patches, (g, g)."""

    name: str
    pixels: NDArray[np.uint8]
    rollout: NDArray[np.float32]
    cam: NDArray[np.float32]
    target: str
    """Class that the second map is about."""
    probability: float
    """Probability that the model gives it."""


def explanation(explained: Explained) -> Figure:
    """Draw the photo, attention rollout and Grad-CAM side by side, each map on a scale of its own from 0."""
    figure = new_figure(3.3)
    photo, rollout, cam = figure.subplots(1, 3)
    for axes, title in (
        (photo, explained.name),
        (rollout, "attention rollout:\nwhere it looked"),
        (cam, f"Grad-CAM: {explained.target}\n({100 * explained.probability:.1f} %)"),
    ):
        axes.set_axis_off()
        axes.set_title(drawable(_short(title)), fontsize=10, parse_math=False)
    photo.imshow(explained.pixels)
    _over(rollout, explained.pixels, explained.rollout)
    _over(cam, explained.pixels, explained.cam)
    if not explained.cam.any():
        cam.text(0.5, 0.04, "no patch speaks for it", transform=cam.transAxes, ha="center", color="white")
    return figure


def _over(axes: Axes, pixels: NDArray[np.uint8], values: NDArray[np.float32]) -> None:
    """Lay a map over the photo in grey: the strongest patch is yellow, and one of 0 is dark."""
    side = len(pixels)
    grey = np.repeat(pixels.mean(2, keepdims=True) / 255, 3, axis=2)
    axes.imshow(grey)
    strongest = max(float(values.max()), 1e-12)
    extent = (-0.5, side - 0.5, side - 0.5, -0.5)
    scaled = values / strongest
    axes.imshow(
        scaled,
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=0.75 * np.clip(scaled, 0.25, 1),
        extent=extent,
        interpolation="bilinear",
    )


def _short(title: str, most: int = 34) -> str:
    return "\n".join(line if len(line) <= most else f"{line[: most - 3]}..." for line in title.split("\n"))
