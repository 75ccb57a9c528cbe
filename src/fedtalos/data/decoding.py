"""Decoding: one image file to its middle square, upright, in RGB.

Shapes: H W pixels of the file, S pixels a side of the square.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedtalos.data.deep_images import Scale, deep_values, is_deep, is_number
from fedtalos.data.image_files import bytes_of, opened_image, upright

T = TypeVar("T")
Pixels = NDArray[np.uint8]

GROUND = (255, 255, 255)
"""Colour that shows where an image is transparent."""

LARGE = 89_478_485
"""Pixels above which an image is decoded at reduced size."""
ONE_AT_A_TIME = 32_000_000  # pixels; several such images at once would take all memory
EMPTY = 4_000_000  # pixels; larger images wait for each other too where the file holds hardly anything of them
HARDLY_ANYTHING = 200  # pixels a byte; photographs have 1 to 10


@dataclass(frozen=True)
class Square:
    """A decoded image, uint8 (S, S, 3), and its peculiarities: "transparent", "several" pictures, "large"."""

    pixels: Pixels
    traits: frozenset[str] = field(default_factory=frozenset)


def inspect_image(file: Path) -> tuple[float, float] | None:
    """Check that a file is an image, and give its least and greatest value if it holds more than 8 bits a channel.

    Raises NotAnImageError where it is something else, and BadImageError where it should be an image and cannot be read.

    >>> inspect_image(Path("xray.png"))
    (0.0, 3901.0)
    """
    with opened_image(file) as (stream, image):
        if not is_deep(image):
            return None
        values, alpha = _in_turn(stream, image, lambda: deep_values(stream, file, image))
        seen = values if alpha is None else values[alpha > 0]
        seen = seen[is_number(seen)]
        return (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)


def decode_image(file: Path, image_size: int, scale: Scale) -> Square:
    """Scale the shorter side to S = ``image_size``, and keep the middle square.

    ``scale`` says what becomes black and white in images of more than 8 bits a channel. Raises as ``inspect_image``.

    >>> decode_image(Path("cat.jpg"), 224, Scale(0, 255)).pixels.shape
    (224, 224, 3)
    """
    with opened_image(file) as (stream, image):
        traits = set()
        # An MPO holds a photo and its preview, a PSD a picture and its layers.
        if image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False):
            traits.add("several")
        if image.width * image.height > LARGE:
            traits.add("large")

        def square() -> tuple[Pixels, bool]:
            if is_deep(image):
                return _deep_square(stream, file, image, image_size, scale)
            return _square(image, image_size)

        pixels, transparent = _in_turn(stream, image, square)
        return Square(pixels, frozenset(traits | ({"transparent"} if transparent else set())))


_alone = ThreadPoolExecutor(1, "large image")
"""One thread for all large images: memory that is freed in a thread stays with it, for its next image."""


def _in_turn(stream: IO[bytes], image: Image.Image, decode: Callable[[], T]) -> T:
    """Decode a large image, or one that becomes far larger than its file, when no other such is being decoded."""
    pixels = image.width * image.height
    empty = pixels > EMPTY and pixels > HARDLY_ANYTHING * bytes_of(stream)
    return _alone.submit(decode).result() if pixels > ONE_AT_A_TIME or empty else decode()


def _square(image: Image.Image, image_size: int) -> tuple[Pixels, bool]:
    """Decode the middle square, and tell whether some of the image is transparent."""
    if image.width * image.height > LARGE:
        image.draft(None, (2 * image_size, 2 * image_size))  # JPEG decodes an eighth of each side in no time
    image = _reduced(upright(image), image_size)
    rgb, transparent = _on_ground(image)
    return np.array(ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.LANCZOS)), transparent


def _reduced(image: Image.Image, image_size: int) -> Image.Image:
    """Average a large image to about twice the size that is needed."""
    factor = min(image.size) // (2 * image_size)
    if image.width * image.height <= LARGE or factor < 2:
        return image
    if image.mode == "1":
        image = image.convert("L")  # RGB takes four times as much
    clear = image.has_transparency_data
    if image.mode not in (("LA", "RGBA") if clear else ("L", "RGB", "CMYK", "F")):
        image = image.convert("RGBA" if clear else "RGB")
    return image.reduce(factor)


def _on_ground(image: Image.Image) -> tuple[Image.Image, bool]:
    """Lay an image on GROUND, in RGB, and tell whether that shows anywhere."""
    image.load()  # palettes tell of their transparency only then
    if not image.has_transparency_data:
        return _as_rgb(image), False
    rgba = image.convert("RGBA")
    least, _ = rgba.getchannel("A").getextrema()
    if least == 255:
        return rgba.convert("RGB"), False
    return Image.alpha_composite(Image.new("RGBA", rgba.size, GROUND), rgba).convert("RGB"), True


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode != "LAB":
        return image.convert("RGB")
    from PIL import ImageCms  # Pillow knows LAB as a colour profile only

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None
    return converted


def _deep_square(
    stream: IO[bytes], file: Path, image: Image.Image, image_size: int, scale: Scale
) -> tuple[Pixels, bool]:
    values, opaque = deep_values(stream, file, image)
    values = scale.to_bytes(np.where(is_number(values), values, scale.low))
    transparent = opaque is not None and bool(opaque.min() < 1)
    if opaque is not None:
        values = values * opaque[..., None] + np.float32(GROUND[0]) * (1 - opaque[..., None])
    channels = []
    for channel in range(values.shape[-1]):
        whole = _reduced(Image.fromarray(np.ascontiguousarray(values[..., channel])), image_size)
        fitted = np.asarray(ImageOps.fit(whole, (image_size, image_size), Image.Resampling.LANCZOS))
        channels.append(np.rint(fitted.clip(0, 255)).astype(np.uint8))
    return np.stack(channels * (3 // len(channels)), axis=-1), transparent
