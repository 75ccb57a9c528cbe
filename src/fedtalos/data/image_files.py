"""Image files: whatever Pillow reads, found by content, with a limit on pixels and without starting programs."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps

STARTS_OR_HOLDS = {"EPS", "WMF", "IPTC", "MPEG", "BUFR", "GRIB", "HDF5"}
"""Formats of Pillow's that are not read: they start a program, hold any other file, or cannot be decoded."""

# fmt: off
CALLED_IMAGES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx", ".tga",
    ".ico", ".icns", ".psd", ".qoi", ".pcx", ".dds", ".sgi",
}
# fmt: on
"""Endings of files that must be images: one that cannot be read is an error. Others are images if their content is."""

TURN = "turn it into PNG or JPEG"
OTHER_PICTURES = dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif")
OTHER_PICTURES |= {".avif": "pip install -U pillow", ".avifs": "pip install -U pillow"}
OTHER_PICTURES |= dict.fromkeys((".jxl", ".svg", ".eps", ".ps", ".pdf", ".ai", ".dcm", ".nii", ".xcf"), TURN)
OTHER_PICTURES |= dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".raw"), TURN)
"""Endings of pictures that may be out of reach, and what helps."""

WITHOUT_SIGNATURE = {".spi": "SPIDER", ".spider": "SPIDER", ".imt": "IMT"}
"""Endings that Pillow does not know, of formats that content alone does not tell."""

MOST_MEGAPIXELS = {"JPEG": 512, "MPO": 512}  # these are reduced while they are decoded
MOST_MEGAPIXELS_OF_OTHERS = 256
LARGE, SPARSE = 32_000_000, 2000
"""Pixels above which a file must hold at least one byte for so many of them; a blank page in 600 dpi has 1000."""


class NotAnImageError(Exception):
    """A file is none of the images that are read here; the message says why, or nothing."""


class BadImageError(Exception):
    """An image cannot be decoded; the message says why."""


def called_image(file: Path) -> bool:
    """Tell whether a file's ending says that it is an image that is read here.

    >>> called_image(Path("cat.JPG")), called_image(Path("labels.csv"))
    (True, False)
    """
    ending = file.suffix.lower()
    return ending in CALLED_IMAGES or (ending in OTHER_PICTURES and _format_of(ending) is not None)


def can_read(ending: str) -> bool:
    """Tell whether images of this ending are read with what is installed.

    >>> can_read(".png")
    True
    """
    return _format_of(ending) is not None


@contextmanager
def opened_image(file: Path) -> Iterator[tuple[IO[bytes], Image.Image]]:
    """Open an image by its content; whatever a decoder raises over broken bytes becomes a BadImageError.

    Raises NotAnImageError where the file is no image, and is not called one.

    >>> with opened_image(Path("cat.jpg")) as (stream, image):
    ...     print(image.size)
    """
    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise NotAnImageError("a link to nothing" if file.is_symlink() else "no file")
        with file.open("rb") as stream:
            image = identified(stream, file.suffix.lower())
            most = MOST_MEGAPIXELS.get(image.format or "", MOST_MEGAPIXELS_OF_OTHERS)
            if (megapixels := image.width * image.height / 1e6) > most:
                raise BadImageError(f"{megapixels:.0f} megapixels, and {most} is the limit of {image.format}")
            size = bytes_of(stream)
            if image.width * image.height > max(LARGE, SPARSE * size):
                raise BadImageError(f"{megapixels:.0f} megapixels in {size} bytes, which hold no such picture")
            yield stream, image
    except BadImageError:
        raise
    except NotAnImageError as error:
        if called_image(file):
            raise BadImageError(str(error) or "no format that is read here") from error
        raise
    except Exception as error:  # decoders raise nearly anything over broken bytes
        raise BadImageError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def bytes_of(stream: IO[bytes]) -> int:
    """Count the bytes of a file, wherever in it the stream is.

    >>> bytes_of(Path("cat.jpg").open("rb"))
    2831
    """
    at = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    stream.seek(at)
    return size


def identified(stream: IO[bytes], ending: str) -> Image.Image:
    """Find the format by content, as Pillow's open does, without its limit on pixels and without some formats.

    Formats without a signature count only where the ending speaks for them. Raises NotAnImageError.

    >>> identified(Path("photo").open("rb"), ending="").format
    'JPEG'
    """
    start = stream.read(64)
    Image.init()
    if start[4:8] == b"ftyp":
        _register_heif()
    named, why = _format_of(ending), ""
    for name in [name for name in Image.ID if name not in STARTS_OR_HOLDS]:
        factory, accept = Image.OPEN[name]
        if accept is None and ending not in CALLED_IMAGES and named != name:
            continue
        try:
            accepted = accept is None or accept(start[:16])
            if isinstance(accepted, str):  # a format that this Pillow was built without
                why = why or accepted
            elif accepted:
                stream.seek(0)
                return factory(stream, "")
        except Exception as error:  # not this format, or a broken file of it
            why = why or ("" if accept is None else str(error))
    raise NotAnImageError(_instead(start) or why)


def _instead(start: bytes) -> str:
    """Say what a file is that is called an image and is none, by its first bytes."""
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: `git lfs pull` fetches the image"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return "HEIC: pip install pillow-heif"
    return "PostScript or PDF" if start.startswith((b"%!PS", b"%PDF")) else ""


@cache
def _register_heif() -> bool:
    """Let Pillow read HEIC, if the plugin is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _format_of(ending: str) -> str | None:
    """Name the format that an ending stands for; None: none that is read here."""
    if OTHER_PICTURES.get(ending) == OTHER_PICTURES[".heic"]:
        _register_heif()
    name = Image.registered_extensions().get(ending) or WITHOUT_SIGNATURE.get(ending)  # loads all of Pillow's formats
    return name if name in Image.OPEN and name not in STARTS_OR_HOLDS else None


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror an image as its EXIF data say.

    >>> upright(image).size
    (3000, 4000)
    """
    image.load()  # asking for EXIF data could load it, and what breaks then would be taken for broken EXIF data
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF data say nothing about the pixels
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
