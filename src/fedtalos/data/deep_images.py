"""Deep images: more than 8 bits a channel, grey or colour, integers or floats, on one scale for a whole data set.

Shapes: H W pixels of the file.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedtalos.data.image_files import identified, upright

Values = NDArray[Any]
Opacity = NDArray[np.float32]

NO_NUMBER = 1e30
"""Values beyond it stand for "nothing was measured here" in float images, as NaN does."""


@dataclass(frozen=True)
class Scale:
    """Range of values that becomes 0 to 255, in images of more than 8 bits.

    >>> Scale.of(0, 3901)
    Scale(low=0, high=4095)
    """

    low: float
    high: float

    @classmethod
    def of(cls, low: float, high: float) -> "Scale":
        """Take the least power of two that holds all values up to ``high``; with negative values, the range itself."""
        if low < 0:
            return cls(low, high if high > low else low + 1)
        if 0 < high < 1:
            return cls(0, 2.0 ** int(np.ceil(np.log2(high))))
        return cls(0, 2 ** int(np.ceil(np.log2(max(high, 1) + 1))) - 1)

    def to_bytes(self, values: Values) -> NDArray[np.float32]:
        """Map ``values`` to 0..255, not rounded yet."""
        return (values.astype(np.float32) - self.low) * np.float32(255 / (self.high - self.low))


def is_deep(image: Image.Image) -> bool:
    """Tell whether an image holds more than 8 bits a channel, of which Pillow would give the upper 8, or clip them.

    >>> is_deep(Image.open("xray.png"))
    True
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return True
    return image.format in ("PNG", "TIFF") and _rawmode(image).split(";")[-1] in ("16B", "16L", "16N")


def deep_values(stream: IO[bytes], file: Path, image: Image.Image) -> tuple[Values, Opacity | None]:
    """Read values (H, W, 1 or 3), and opacity 0..1 (H, W), None: opaque.

    >>> with opened_image(file) as (stream, image):
    ...     values, opacity = deep_values(stream, file, image)
    """
    clear = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(upright(image))[..., None]
        opaque = None
    else:
        values, opaque = _sixteen_bits(stream, file, image)
    if opaque is None and isinstance(clear, int | tuple):
        opaque = (values != np.asarray(clear)).any(axis=-1).astype(np.float32)
    return values, opaque


def _rawmode(image: Image.Image) -> str:
    """Name the layout of a file's pixels, as Pillow calls it."""
    tiles = getattr(image, "tile", [])
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _sixteen_bits(stream: IO[bytes], file: Path, image: Image.Image) -> tuple[Values, Opacity | None]:
    """Read colour of 16 bits, which Pillow has no mode for: the upper bytes, then the lower ones."""
    rawmode = _rawmode(image)
    stream.seek(0)
    again = identified(stream, file.suffix.lower())
    if rawmode == "LA;16B":  # two bytes of grey, two of opacity
        _read_as(again, "RGBA")
        grey_and_alpha = np.asarray(upright(again)).astype(np.uint16)
        sixteen: Values = grey_and_alpha[..., 0::2] << 8 | grey_and_alpha[..., 1::2]
    else:
        _read_as(again, rawmode[:-1] + ("L" if _upper_first(rawmode) else "B"))
        lower = np.asarray(upright(again)).astype(np.uint16)
        stream.seek(0)
        image = identified(stream, file.suffix.lower())
        sixteen = np.asarray(upright(image)).astype(np.uint16) << 8 | lower
    if sixteen.shape[-1] in (2, 4):
        return sixteen[..., :-1], (sixteen[..., -1] / 65535).astype(np.float32)
    return sixteen, None


def _upper_first(rawmode: str) -> bool:
    return rawmode.endswith("B") or (rawmode.endswith("N") and sys.byteorder == "big")


def _read_as(image: Image.Image, rawmode: str) -> None:
    tiles: list[Any] = getattr(image, "tile", [])
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode) for tile in tiles
    ]


def is_number(values: Values) -> NDArray[np.bool_]:
    """Tell where something was measured.

    >>> is_number(np.array([1.0, np.nan, -3.4e38]))
    array([ True, False, False])
    """
    return np.isfinite(values) & (np.abs(values) < NO_NUMBER) if values.dtype.kind == "f" else values == values
