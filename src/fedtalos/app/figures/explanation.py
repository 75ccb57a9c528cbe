"""Figure of an explanation: a photo, and what the model's answer hangs on, drawn over it.

Importing this module takes up to a second: import it late.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

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
    """Draw the photo, attention rollout and Grad-CAM side by side, each map on a scale of its own.

    Rollout's goes from its least patch to its greatest, since shares of attention lie close together.
    Grad-CAM's begins at 0.
    """
    figure = new_figure(3.2)
    photo, rollout, cam = figure.subplots(1, 3)
    for axes, title in (
        (photo, explained.name),
        (rollout, "attention rollout:\nwhere it looked"),
        (cam, f"Grad-CAM: {explained.target}\n({100 * explained.probability:.1f} %)"),
    ):
        axes.set_axis_off()
        axes.set_title(drawable(_short(title)), fontsize=10, parse_math=False)
    photo.imshow(explained.pixels)
    _over(rollout, explained.pixels, explained.rollout, least=float(explained.rollout.min()))
    _over(cam, explained.pixels, explained.cam, least=0.0)
    if not explained.cam.any():
        dark = {"facecolor": "black", "alpha": 0.6, "linewidth": 0}  # behind it, for photos may be white
        cam.text(0.5, 0.04, "no patch speaks for it", transform=cam.transAxes, ha="center", color="white", bbox=dark)
    return figure


def _over(axes: Axes, pixels: NDArray[np.uint8], values: NDArray[np.float32], least: float) -> None:
    """Lay a map over the photo in grey: the strongest patch is yellow; up to ``least``, the photo stays grey."""
    span = max(float(values.max()) - least, 1e-12)
    scaled = Image.fromarray(((values - least) / span).astype(np.float32))
    smooth = np.asarray(scaled.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)).clip(0, 1)
    axes.imshow(pixels.mean(2), cmap="gray", vmin=0, vmax=255)
    axes.imshow(smooth, cmap="inferno", vmin=0, vmax=1, alpha=0.8 * np.sqrt(smooth))


def _short(title: str) -> str:
    return "\n".join(line if len(line) <= 34 else f"{line[:31]}..." for line in title.split("\n"))
