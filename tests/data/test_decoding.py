"""Single images: formats by content, deep values on one scale, transparency, large photos, what is refused."""

import os
from pathlib import Path

import numpy as np
import PIL
import pytest
from pictures import RED, deep_png, deep_tiff, picture, png, write
from PIL import Image, ImageCms

from fedtalos.data import decoding, image_files
from fedtalos.data.decoding import decode_image, inspect_image
from fedtalos.data.deep_images import Scale
from fedtalos.data.image_files import BadImageError, NotAnImageError
from fedtalos.randomness import generator

BYTES = Scale(0, 255)
FORMATS = "PNG JPEG BMP DIB TIFF GIF PPM WEBP JPEG2000 TGA ICO PCX SGI DDS ICNS".split()  # noqa: SIM905
Image.init()
FORMATS += ["QOI"] * ("QOI" in Image.SAVE)  # which Pillow before 11.3 reads and does not write


def one_colour(file: Path, size: int = 4, scale: Scale = BYTES) -> list[int]:
    pixels = decode_image(file, size, scale).pixels.reshape(-1, 3)
    assert np.abs(pixels - pixels[0].astype(float)).max() <= 1
    return pixels[0].tolist()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["a.png", "a", "a.JPG_large"])
def test_formats_are_told_by_content(tmp_path, kind, name):
    if kind == "TGA" and name != "a.png":
        pytest.skip("TGA has no signature; its ending must speak for it")
    file = picture(tmp_path / name, size=(64, 64), format=kind)
    assert inspect_image(file) is None
    lossy = kind in ("JPEG", "WEBP", "JPEG2000")
    assert np.abs(np.array(one_colour(file)) - RED).max() <= (6 if lossy else 0)


def test_a_format_without_signature_goes_by_its_ending(tmp_path):
    assert one_colour(picture(tmp_path / "a.tga")) == list(RED)
    (tmp_path / "a.tga").rename(tmp_path / "a.dat")
    with pytest.raises(NotAnImageError):
        inspect_image(tmp_path / "a.dat")


def test_avif_is_read_where_pillow_has_it(tmp_path):
    if not image_files.can_read(".avif"):
        pytest.skip("this Pillow has no AVIF")
    assert np.abs(np.array(one_colour(picture(tmp_path / "a.jpg", format="AVIF"))) - RED).max() < 6


def test_heic_is_read_where_its_plugin_is(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    assert np.abs(np.array(one_colour(picture(tmp_path / "a.jpg", size=(64, 64), format="HEIF"))) - RED).max() < 6
    assert inspect_image((tmp_path / "a.jpg").rename(tmp_path / "a.heic")) is None


def test_what_is_no_image_is_told_from_what_should_be_one(tmp_path):
    for number, content in enumerate(
        [b"", b"label: cat\n", b"P5 is a format", b"BMW", b"GIF is not JPEG", b"\0" * 300]
    ):
        with pytest.raises(NotAnImageError):
            inspect_image(write(tmp_path / f"{number}.txt", content))
        with pytest.raises(BadImageError):
            inspect_image(write(tmp_path / f"{number}.jpg", content))
    rng = generator(0, "noise")
    for number in range(200):
        with pytest.raises(NotAnImageError):
            inspect_image(write(tmp_path / "noise", rng.bytes(1 + 7 * number)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404", "web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "PostScript"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_what_stands_in_an_images_place_is_named(tmp_path, content, says):
    with pytest.raises(BadImageError, match=says):
        inspect_image(write(tmp_path / "a.jpg", content))


@pytest.mark.parametrize("ending", ["eps", "ps", "jpg", "iim", "wmf"])
def test_no_format_that_starts_a_program_or_holds_any_other_is_opened(tmp_path, ending):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    photo = b"\x1c\x02\x00\x00\x02\x00\x02"  # IPTC: a few facts, and then any file
    for content in (postscript, photo, b"\xd7\xcd\xc6\x9a\0\0" + bytes(60)):
        with pytest.raises((NotAnImageError, BadImageError)):
            inspect_image(write(tmp_path / f"a.{ending}", content))


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, says in (("pipe", "no file"), ("gone", "a link to nothing"), ("loop", "a link to nothing")):
        with pytest.raises(BadImageError, match=says):
            inspect_image(tmp_path / f"{name}.png")
    (tmp_path / "pipe.png").rename(tmp_path / "pipe")
    with pytest.raises(NotAnImageError):
        inspect_image(tmp_path / "pipe")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "JPEG2000"])
def test_broken_images_are_never_taken_for_whole_ones(tmp_path, kind):
    noise = Image.fromarray(generator(0, "noise").integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png", kind)
    content = (tmp_path / "a.png").read_bytes()
    for cut in (40, len(content) // 2, len(content) - 300):
        with pytest.raises(BadImageError):
            decode_image(write(tmp_path / "a.png", content[:cut]), 8, BYTES)
    if kind == "PNG":  # others have no checksums
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        with pytest.raises(BadImageError):
            decode_image(write(tmp_path / "a.png", bytes(changed)), 8, BYTES)
        with pytest.raises(BadImageError):
            inspect_image(write(tmp_path / "b.png", deep_png(np.zeros((8, 8, 3)))[:-24]))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # as decode_folder does
def test_broken_exif_data_change_nothing(tmp_path):
    picture(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.abs(np.array(one_colour(tmp_path / "a.jpg")) - RED).max() <= 6


# shape and colour


def from_image(tmp_path: Path, image: Image.Image, size: int = 4, suffix: str = "png", **save) -> np.ndarray:
    image.save(tmp_path / f"a.{suffix}", **save)
    return decode_image(tmp_path / f"a.{suffix}", size, BYTES).pixels


def test_the_middle_square_is_kept(tmp_path):
    stripes = np.zeros((4, 12, 3), np.uint8)
    stripes[:, 4:8] = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    assert np.array_equal(from_image(tmp_path, Image.fromarray(stripes)), stripes[:, 4:8])


def test_shrinking_is_antialiased(tmp_path):
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    pixels = from_image(tmp_path, Image.fromarray(checks.astype(np.uint8)))
    assert (np.abs(pixels.astype(int) - 127) < 20).all()


def test_exif_orientation_is_respected(tmp_path):
    upright = np.zeros((4, 4, 3), np.uint8)
    upright[0, 1] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise to see me upright"
    assert np.array_equal(from_image(tmp_path, Image.fromarray(np.rot90(upright)), exif=exif), upright)
    deep = Image.fromarray(np.rot90(upright[..., 0]).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", exif=exif)
    assert np.array_equal(decode_image(tmp_path / "deep.png", 4, Scale(0, 65535)).pixels, upright)


def test_every_colour_mode_becomes_rgb(tmp_path):
    for mode in ("L", "1", "P", "RGBA", "LA"):
        white = from_image(tmp_path, Image.new("RGB", (4, 4), "white").convert(mode))
        assert np.unique(white).tolist() == [255], mode
    orange = Image.new("RGB", (4, 4), (200, 100, 50))
    reads_its_own = (
        int(PIL.__version__.split(".")[0]) >= 13
    )  # before, Pillow could not read the YCbCr TIFFs that it wrote
    for mode in ("CMYK", "RGBX", *["YCbCr"] * reads_its_own):
        assert np.abs(from_image(tmp_path, orange.convert(mode), suffix="tif")[0, 0] - [200, 100, 50.0]).max() < 2
    lab = ImageCms.createProfile("LAB")
    in_lab = ImageCms.profileToProfile(orange, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    assert np.abs(from_image(tmp_path, in_lab, suffix="tif")[0, 0] - [200, 100, 50.0]).max() < 2


# transparency


def see_through() -> dict[str, Image.Image]:
    """The left half is visible; the right half is not, and has another colour."""
    colour = np.full((8, 8, 4), 255, np.uint8)
    colour[..., :3] = (40, 80, 120)
    colour[:, 4:] = (255, 0, 255, 0)
    rgba = Image.fromarray(colour)
    palette = Image.fromarray((np.arange(8) // 4)[None].repeat(8, 0).astype(np.uint8))
    palette.putpalette([40, 80, 120, 255, 0, 255])
    return {"RGBA": rgba, "LA": rgba.convert("LA"), "P": palette, "RGB": rgba.convert("RGB"), "L": rgba.convert("L")}


@pytest.mark.parametrize(
    ("mode", "suffix", "save"),
    [
        ("RGBA", "png", {}),
        ("RGBA", "webp", {"lossless": True}),
        ("RGBA", "tif", {}),
        ("RGBA", "tga", {}),
        ("RGBA", "jp2", {}),
        ("LA", "png", {}),
        ("P", "png", {"transparency": 1}),
        ("P", "png", {"transparency": bytes([255, 0])}),
        ("P", "gif", {"transparency": 1}),
        ("RGB", "png", {"transparency": (255, 0, 255)}),
        ("L", "png", {"transparency": 105}),
    ],
)
def test_what_lies_under_full_transparency_is_white(tmp_path, mode, suffix, save):
    see_through()[mode].save(tmp_path / f"a.{suffix}", **save)
    square = decode_image(tmp_path / f"a.{suffix}", 8, BYTES)
    assert square.traits == {"transparent"}
    assert (square.pixels[:, 4:] == 255).all()
    seen = (72,) * 3 if mode in ("L", "LA") else (40, 80, 120)
    assert np.abs(square.pixels[:, :4] - np.array(seen, float)).max() <= 1


def test_half_transparency_mixes_and_opaque_images_stay_as_they_are(tmp_path):
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.unique(from_image(tmp_path, half)).tolist() == [127]
    opaque = Image.new("RGBA", (4, 4), (*RED, 255))
    opaque.save(tmp_path / "b.png")
    square = decode_image(tmp_path / "b.png", 4, BYTES)
    assert square.traits == set()
    assert square.pixels[0, 0].tolist() == list(RED)


def test_the_first_picture_of_several_counts(tmp_path):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), "green")
    for suffix, save in {"gif": {}, "png": {}, "webp": {"lossless": True}, "tif": {}}.items():
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **save)
        square = decode_image(tmp_path / f"a.{suffix}", 4, BYTES)
        assert square.traits == {"several"}, suffix
        assert square.pixels[0, 0].tolist() == list(RED), suffix


# more than 8 bits a channel


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [
        (0, 255, (0, 255)),
        (0, 256, (0, 511)),
        (3, 900, (0, 1023)),
        (0, 3901, (0, 4095)),
        (0, 65535, (0, 65535)),
        (0, 0, (0, 1)),
        (0, 1, (0, 1)),
        (0.0, 0.2, (0, 0.25)),
        (-1024, 3071, (-1024, 3071)),
        (-5, -5, (-5, -4)),
        (0, 2**31 - 1, (0, 2**31 - 1)),
    ],
)
def test_the_scale_is_the_least_power_of_two_that_holds_all(low, high, scale):
    chosen = Scale.of(low, high)
    assert (chosen.low, chosen.high) == scale
    assert chosen.to_bytes(np.array([chosen.low, chosen.high])).tolist() == [0, 255]


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_pngs_keep_what_they_hold(tmp_path, bits, channels, interlaced):
    values = generator(0, "values").integers(0, 2**bits, (8, 8, channels))
    values[0, 0] = 2**bits - 1
    if channels in (2, 4):
        values[..., -1] = 65535
    file = write(tmp_path / "a.png", deep_png(values, interlaced=interlaced))
    low, high = inspect_image(file)
    shown = values[..., : channels - (channels in (2, 4))]
    assert (low, high) == (shown.min(), 2**bits - 1)
    expected = np.rint(np.broadcast_to(shown, (8, 8, 3)) * (255 / (2**bits - 1)))
    assert np.array_equal(decode_image(file, 8, Scale.of(low, high)).pixels, expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
def test_16_bit_colour_of_tiff_in_both_byte_orders(tmp_path, order, packed):
    values = generator(0, "values").integers(0, 1024, (8, 8, 3))
    file = write(tmp_path / "a.tif", deep_tiff(values, order, packed))
    assert inspect_image(file) == (values.min(), values.max())
    assert np.array_equal(decode_image(file, 8, Scale(0, 1023)).pixels, np.rint(values * (255 / 1023)))


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint16])
def test_other_deep_images(tmp_path, dtype):
    values = np.linspace(0, 1000, 64).reshape(8, 8).astype(dtype)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert inspect_image(tmp_path / "a.tif") == (0, 1000)
    pixels = decode_image(tmp_path / "a.tif", 8, Scale(0, 1023)).pixels
    assert np.abs(pixels[..., 0] - values * (255 / 1023)).max() <= 0.51


def test_negative_values_and_holes_in_floats(tmp_path):
    values = np.linspace(-3, 5, 64).reshape(8, 8).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -3.4e38
    Image.fromarray(values).save(tmp_path / "a.tif")
    low, high = inspect_image(tmp_path / "a.tif")
    assert low > -3
    assert high == 5
    pixels = decode_image(tmp_path / "a.tif", 8, Scale.of(low, high)).pixels
    assert pixels[0, :3].max() == 0
    assert pixels[7, 7, 0] == 255


@pytest.mark.parametrize(("channels", "clear"), [(1, (5,)), (3, (5, 5, 5))])
def test_a_colour_that_means_clear_in_deep_images(tmp_path, channels, clear):
    values = np.full((8, 8, channels), 700)
    values[:4] = 5
    file = write(tmp_path / "a.png", deep_png(values, clear))
    assert inspect_image(file) == (700, 700)
    square = decode_image(file, 8, Scale(0, 1023))
    assert square.traits == {"transparent"}
    assert square.pixels[:, 0, 0].tolist() == [255] * 4 + [174] * 4


# large images


@pytest.fixture
def small_limits(monkeypatch):
    """As if 400 pixels were large."""
    monkeypatch.setattr(decoding, "LARGE", 400)
    monkeypatch.setattr(decoding, "ONE_AT_A_TIME", 300)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "jpg"), ("L", "jpg"), ("RGB", "png"), ("P", "png"), ("RGBA", "png"), ("1", "png")]
)
def test_large_images_are_decoded_at_reduced_size(tmp_path, mode, suffix, monkeypatch):
    blocks = np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((100, 200), np.uint8))
    Image.fromarray(blocks).convert("RGB").convert(mode).save(tmp_path / f"a.{suffix}")
    square = decode_image(tmp_path / f"a.{suffix}", 8, BYTES)
    assert square.traits == {"large"}
    monkeypatch.setattr(decoding, "LARGE", 10**9)
    whole = decode_image(tmp_path / f"a.{suffix}", 8, BYTES)
    assert whole.traits == set()
    assert np.abs(square.pixels.astype(int) - whole.pixels).max() < 40  # at the edges


@pytest.mark.usefixtures("small_limits")
def test_large_jpegs_are_never_held_whole(tmp_path, monkeypatch):
    picture(tmp_path / "a.jpg", size=(800, 600))
    sizes = []
    fit = decoding.ImageOps.fit
    monkeypatch.setattr(decoding.ImageOps, "fit", lambda image, *rest: sizes.append(image.size) or fit(image, *rest))
    decode_image(tmp_path / "a.jpg", 8, BYTES)
    assert max(sizes[0]) <= 100


def test_more_than_the_limit_names_it(tmp_path):
    empty = write(tmp_path / "a.png", png(30_000, 30_000, 8, 0, b""))
    with pytest.raises(BadImageError, match="900 megapixels, and 256 is the limit of PNG"):
        inspect_image(empty)
    jpeg = bytearray(picture(tmp_path / "a.jpg").read_bytes())
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = (30_000).to_bytes(2, "big") * 2
    with pytest.raises(BadImageError, match="900 megapixels, and 512 is the limit of JPEG"):
        inspect_image(write(tmp_path / "b.jpg", bytes(jpeg)))


def test_108_megapixels_are_read(tmp_path):
    """As a PNG of one bit a pixel, which is quickly made."""
    file = write(tmp_path / "a.png", png(12_000, 9_000, 1, 0, (b"\0" + b"\xff" * 1500) * 9_000))
    square = decode_image(file, 8, BYTES)
    assert square.traits == {"large"}
    assert square.pixels.min() >= 254


def test_nothing_of_pillow_is_changed_for_others():
    assert Image.MAX_IMAGE_PIXELS == 2**30 // 4 // 3
