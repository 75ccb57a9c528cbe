"""Small pictures as data in the page itself: maps of numbers, and images."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LIGHT, DARK = (238, 242, 247), (0, 84, 140)
"""Colours of the smallest number above zero and of the largest; zero is left transparent."""


def map_of(numbers: NDArray[np.float64], largest: float | None = None) -> str:
    """Colour a matrix of numbers from 0 on, a pixel each, as the address of a PNG within the page.

    ``largest`` gets the darkest colour; None: the largest of the matrix.

    >>> map_of(np.eye(2))[:22]
    'data:image/png;base64,'
    """
    top = float(np.nanmax(numbers, initial=0)) if largest is None else largest
    shares = np.nan_to_num(numbers / top if top else numbers * 0).clip(0, 1)[..., None]
    colours = np.array(LIGHT) + shares * (np.array(DARK) - np.array(LIGHT))
    return png(np.concatenate([colours, 255.0 * (shares > 0)], axis=2).round().astype(np.uint8))


def png(pixels: NDArray[np.uint8]) -> str:
    """Write pixels (H, W, 3 or 4) as the address of a PNG within the page."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
