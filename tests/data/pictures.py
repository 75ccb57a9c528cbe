"""Image files for tests, as people and cameras leave them; some kinds are ones that Pillow reads and cannot write."""

import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

RED, BLUE = (250, 10, 20), (10, 20, 250)


def picture(file: Path, colour=RED, size=(20, 10), **save) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, **save)
    return file


def write(file: Path, content: bytes = b"x") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, clear: bytes = b"", interlaced=False) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", clear) if clear else b"")
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )


def deep_png(values: np.ndarray, clear: tuple[int, ...] = (), interlaced=False) -> bytes:
    """16 bits a channel: (H, W, C) of 1, 2 (grey, opacity), 3 or 4 channels."""
    height, width, channels = values.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [values[y::down, x::right] for y, x, down, right in passes]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts if part.size for row in part)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(width, height, 16, colour, rows, struct.pack(f">{len(clear)}H", *clear), interlaced)


def deep_tiff(values: np.ndarray, order: str, packed=False) -> bytes:
    """16 bits a channel in colour, (H, W, 3), in byte order "<" or ">"; packed by zlib, which libtiff unpacks."""
    height, width, channels = values.shape
    data = values.astype(order + "u2").tobytes()
    data = zlib.compress(data) if packed else data
    tags = [(256, width), (257, height), (258, None), (259, 8 if packed else 1), (262, 2), (273, None)]
    tags += [(277, channels), (278, height), (279, len(data))]
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    after = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, value in tags:
        if tag == 258:
            entries += struct.pack(order + "HHII", tag, 3, channels, after)
        elif tag in (273, 279):
            entries += struct.pack(order + "HHII", tag, 4, 1, after + len(bits) if value is None else value)
        else:
            entries += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    return start + entries + struct.pack(order + "I", 0) + bits + data


class Bars:
    """A bar that keeps what it is told: title, total, unit, and the sum of its advances."""

    def __init__(self) -> None:
        self.seen: list[list] = []

    @contextmanager
    def __call__(self, title, total, unit):
        self.seen.append([title, total, unit, 0])

        def advance(count):
            self.seen[-1][3] += count

        yield advance
