"""Photos by name, folder and pattern, decoded as training decodes them; and folders of one's own with labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import BLUE, RED, deep_png, picture, write
from PIL import Image

from fedtalos.data.photos import open_photos, read_labelled_folder
from fedtalos.errors import InputError
from fedtalos.notes import noted

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def names(*places: str) -> list[str]:
    return [str(file) for file in open_photos(places).files]


def test_files_folders_and_patterns_are_found_once_each_in_order():
    for file in ("b.png", "trip/z.jpg", "trip/deep/a.png", "trip/.hidden.png", "x1.png", "x2.png"):
        picture(Path(file))
    write(Path("trip/notes.txt"))
    noted()
    assert names("b.png", "trip", "x*.png", "b.png") == [
        "b.png",
        "trip/deep/a.png",
        "trip/z.jpg",
        "x1.png",
        "x2.png",
    ]
    assert noted() == {"left out": "files that are no images: 1 (trip/notes.txt)"}
    assert names("**/a.png") == ["trip/deep/a.png"]
    assert names("tr*p") == ["trip/deep/a.png", "trip/z.jpg"]
    picture(Path("[odd].png"))
    assert names("[odd].png") == ["[odd].png"]  # a file's own name, though it looks like a pattern


def test_pixels_are_decoded_as_for_training_and_what_was_decided_is_said():
    noted()
    picture(Path("wide.png"), RED, (40, 20))
    Image.new("RGBA", (20, 40), (*BLUE, 0)).save("clear.png")
    batches = list(open_photos(["wide.png", "clear.png"]).batches(8, 1))
    assert [batch.shape for batch in batches] == [torch.Size([1, 3, 8, 8])] * 2
    assert [batch[0, :, 0, 0].tolist() for batch in batches] == [list(RED), [255, 255, 255]]
    assert noted() == {"transparent images": "1 of 2 are transparent in part, and lie on white"}


def test_deep_images_share_one_scale_and_that_is_said():
    values = np.full((4, 4, 1), 3901, np.uint16)
    write(Path("x.png"), deep_png(values))
    write(Path("y.png"), deep_png(values // 2))
    (pixels,) = open_photos(["x.png", "y.png"]).batches(4, 8)
    assert pixels[:, 0, 0, 0].tolist() == [round(3901 * 255 / 4095), round(1950 * 255 / 4095)]
    assert "4095 white, by these images alone" in noted()["image depth"]


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ((), "expected files, folders or patterns, got none"),
        (("nope.jpg",), "nope.jpg: no such image or folder"),
        (("*.tif",), r"'\*.tif': no file is called so"),
        (("empty",), "empty holds no files"),
        (("notes.txt",), "notes.txt is not a readable image"),
        (("words",), "none of words/a.txt is an image"),
        (("torn",), r"torn/a.jpg is not a readable image .*, nor is 1 other \(torn/b.jpg\)"),
    ],
)
def test_what_is_no_photo_is_said(places, says):
    Path("empty").mkdir()
    write(Path("notes.txt"))
    write(Path("words/a.txt"))
    for name in ("a", "b"):
        write(Path(f"torn/{name}.jpg"), b"\xff\xd8 torn")
    with pytest.raises(InputError, match=says):
        open_photos(places)


# with labels


def test_folders_tell_the_class_and_some_of_the_classes_are_enough():
    picture(Path("mine/dog/1.png"), BLUE)
    picture(Path("mine/cat/2.png"), RED)
    picture(Path("mine/dog/deep/3.png"), BLUE)
    images = read_labelled_folder(Path("mine"), ("ape", "cat", "dog"), 4)
    assert images.labels.tolist() == [1, 2, 2]
    assert images.pixels[:, :, 0, 0].tolist() == [list(RED), list(BLUE), list(BLUE)]
    assert images.pixels.shape == (3, 3, 4, 4)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("mine/cats/1.png", "mine/cats is no class that the model knows; did you mean 'cat'"),
        ("mine/1.png", "holds 1 images and no class folders"),
        ("mine/cat/notes.txt", "none of mine/cat/notes.txt is an image"),
    ],
)
def test_folders_that_do_not_fit_are_refused(file, says):
    picture(Path(file)) if file.endswith("png") else write(Path(file))
    with pytest.raises(InputError, match=says):
        read_labelled_folder(Path("mine"), ("cat", "dog"), 4)


def test_folders_of_splits_are_not_mixed():
    for split in ("train", "test"):
        picture(Path(f"mine/{split}/cat/1.png"))
    with pytest.raises(InputError, match=r"mine holds splits \(test, train\): give one of their folders"):
        read_labelled_folder(Path("mine"), ("cat", "dog"), 4)
    assert len(read_labelled_folder(Path("mine/test"), ("cat", "dog"), 4)) == 1
