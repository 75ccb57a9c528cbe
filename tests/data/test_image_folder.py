"""Image folders as people keep them: splits, classes, nested and odd files, and what is said of them."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import BLUE, RED, Bars, deep_png, picture, write
from PIL import Image

from fedtalos import notes
from fedtalos.data.class_names import check_same_classes, class_name
from fedtalos.data.dataset_loader import load_dataset
from fedtalos.data.folder_layout import split_of
from fedtalos.data.image_folder import read_image_folder
from fedtalos.errors import InputError

SPLITS = ("train", "calibration", "val", "test")


@pytest.fixture(autouse=True)
def no_notes_of_others():
    notes.noted()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of ten, red and blue, no test set."""
    for i in range(10):
        picture(tmp_path / "red" / f"{i}.png")
        picture(tmp_path / "blue" / f"{i}.{('jpg', 'webp', 'PNG', 'jpeg')[i % 4]}", BLUE, size=(9, 31))
    return tmp_path


def load(folder: Path, **options):
    return load_dataset("folder", folder, **{"image_size": 8, "calibration_fraction": 0.1, **options})


def fill(folder: Path, count: int = 2, classes=("blue", "red")) -> None:
    for name in classes:
        for i in range(count):
            picture(folder / name / f"{i}.png", BLUE if name == "blue" else RED)


def check_colours(images, classes) -> None:
    colours = torch.tensor([{"blue": BLUE, "red": RED}[name] for name in classes])[images.labels]
    assert (images.pixels.amax(dim=(2, 3)).int() - colours).abs().max() < 12  # JPEG and WebP lose a little


def test_a_folder_of_class_folders(folder):
    dataset = load(folder)
    assert dataset.classes == ("blue", "red")
    assert [len(getattr(dataset, name)) for name in SPLITS] == [13, 1, 2, 4]
    for name in SPLITS:
        assert getattr(dataset, name).pixels.shape[1:] == (3, 8, 8)
        check_colours(getattr(dataset, name), dataset.classes)
    assert len(dataset.train.labels[:6].unique()) == 2  # the first n are of mixed classes
    said = notes.noted()
    assert said["images"] == "train 20: blue 10, red 10"
    assert said["test images"].startswith("4, drawn from the training images")
    assert said["validation images"] == "2, drawn from the training images (val_fraction 0.1)"


def test_whatever_pillow_opens_is_read_at_any_depth(tmp_path):
    endings = "png JPG bmp tif gif ppm jfif webp tga ico jp2 PNG apng".split()  # noqa: SIM905
    for place in (tmp_path / "red", tmp_path / "blue" / "2019", tmp_path / "blue" / "2020" / "05"):
        for ending in endings:
            kind = {"jfif": "JPEG", "apng": "PNG"}.get(ending)
            picture(place / f"a.{ending}", RED if place.name == "red" else BLUE, size=(32, 32), format=kind)
    picture(tmp_path / "red" / "without_ending", size=(32, 32), format="JPEG")
    photos = read_image_folder(tmp_path, 8)
    assert torch.bincount(photos.train.labels).tolist() == [26, 14]
    check_colours(photos.train, photos.classes)


def test_other_files_are_left_out_and_said_and_hidden_ones_are_passed_over(folder):
    before = read_image_folder(folder, 8).train
    notes.noted()
    for name in ("notes.txt", "more/labels.csv", "movie.mp4", "README"):
        write(folder / "red" / name)
    for name in (".hidden.png", "Thumbs.db", "desktop.ini", "._0.png", ".DS_Store", "@eaDir/0.png", "Icon\r"):
        write(folder / "red" / name, b"broken")
    for name in (".git/a.png", "__MACOSX/red/0.png", ".ipynb_checkpoints/a.png", "README.md", "$RECYCLE.BIN/a.png"):
        write(folder / name, b"broken")
    write(folder / "loose.png")
    after = read_image_folder(folder, 8)
    assert after.classes == ("blue", "red")
    assert torch.equal(after.train.pixels, before.pixels)
    said = notes.noted()
    assert said.keys() == {"images", "left out", "image cache"}
    assert said["left out"] == (
        "files that are no images: 4 (1 .csv, 1 .mp4, 1 .txt and 1 more); images in no class folder: 1"
    )
    read_image_folder(folder, 8)
    assert notes.noted()["left out"] == said["left out"]  # from the cache, too


def test_pictures_that_are_out_of_reach_are_said_with_what_helps(folder):
    for name, content in {"a.svg": b"<svg/>", "b.cr3": b"....ftypcrx ", "c.jxl": b"\xff\x0a"}.items():
        write(folder / "red" / name, content)
    read_image_folder(folder, 8)
    assert "1 .svg: turn it into PNG or JPEG" in notes.noted()["left out"]
    write(folder / "green" / "a.svg")
    with pytest.raises(InputError, match=r"class 'green' holds no image that can be read, but 1 \.svg"):
        read_image_folder(folder, 8)


# splits


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Valid", "Testing"),
        ("TRAIN", "validation", "eval"),
        ("training_set", "dev", "test_set"),
        ("train images", "Validation Set", "test-images"),
    ],
)
def test_splits_are_taken_as_they_are(tmp_path, train, val, test):
    for name, count in ((train, 10), (val, 3), (test, 4)):
        fill(tmp_path / name, count)
    dataset = load(tmp_path, val_fraction=0.5, calibration_fraction=0)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [20, 0, 6, 8]
    said = notes.noted()
    assert said["validation images"] == "the folder's own 6; val_fraction is not used"
    assert said["images"] == "train 20: blue 10, red 10; val 6: blue 3, red 3; test 8: blue 4, red 4"
    assert "test images" not in said


def test_a_train_and_val_layout_validates_on_val_and_draws_a_test_set(tmp_path):
    """ImageNet's: its val images are for choosing, as everywhere; a test set is drawn from its train images."""
    fill(tmp_path / "train", 10)
    fill(tmp_path / "val", 3)
    dataset = load(tmp_path, calibration_fraction=0)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [16, 0, 6, 4]
    assert "a folder called test would be taken as it is" in notes.noted()["test images"]


def test_train_and_test_alone_and_train_alone(tmp_path):
    fill(tmp_path / "a" / "train", 10)
    fill(tmp_path / "a" / "test", 1)
    assert [len(getattr(load(tmp_path / "a", calibration_fraction=0), name)) for name in SPLITS] == [18, 0, 2, 2]
    fill(tmp_path / "b" / "train", 10)
    write(tmp_path / "b" / "annotations" / "a.xml")
    dataset = load(tmp_path / "b", calibration_fraction=0)
    assert dataset.classes == ("blue", "red")
    assert [len(getattr(dataset, name)) for name in SPLITS] == [14, 0, 2, 4]
    assert notes.noted()["folders left out"].startswith("annotations: ")


def test_images_without_labels_are_left_out(tmp_path):
    fill(tmp_path / "train", 10)
    for i in range(5):
        picture(tmp_path / "test" / f"{i}.jpg")
    assert len(load(tmp_path).test) == 4
    said = notes.noted()
    assert "holds no class folders; without labels its 5 images" in said["test left out"]


def test_splits_inside_class_folders(tmp_path):
    for name in ("blue", "red"):
        for split, count in (("train", 10), ("test", 2)):
            for i in range(count):
                picture(tmp_path / name / split / "deep" / f"{i}.png", BLUE if name == "blue" else RED)
    photos = read_image_folder(tmp_path, 8)
    assert photos.classes == ("blue", "red")
    assert (len(photos.train), len(photos.test)) == (20, 4)
    check_colours(photos.test, photos.classes)
    picture(tmp_path / "red" / "loose.png")
    photos = read_image_folder(tmp_path, 8)
    assert (len(photos.train), photos.test) == (25, None)
    assert "images of one class" in notes.noted()["folders read together"]


def test_classes_that_are_called_like_splits(tmp_path):
    """A train beside a bus; tests beside controls."""
    fill(tmp_path / "a", classes=("bus", "train", "car"))
    assert read_image_folder(tmp_path / "a", 8).classes == ("bus", "car", "train")
    fill(tmp_path / "b", classes=("test", "control"))
    assert read_image_folder(tmp_path / "b", 8).classes == ("control", "test")
    fill(tmp_path / "c", classes=("train/steam", "bus", "car"))
    assert read_image_folder(tmp_path / "c", 8).classes == ("bus", "car", "train")
    assert split_of("trainer") is None
    assert split_of("contest") is None


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("train/red/a.png", "Training/red/a.png", "test/red/a.png"), "both say that they hold the train images"),
        (("val/red/a.png", "valid/red/a.png", "train/red/a.png"), "both say that they hold the val images"),
        (("val/red/a.png", "test/red/a.png"), "no train folder"),
        (("train/a.png", "test/a.png"), "train holds 1 images and no class folders: put those of each class into"),
        (("train/notes.txt", "test/red/a.png"), "train holds no class folders"),
        (("a.png", "b.jpg"), "holds 2 images and no class folders: put those of each class into"),
        (("red/a.png",), "holds images of one class, 'red': a classifier needs two or more$"),
        (("photos/red/a.png", "photos/blue/a.png"), "one class, 'photos'.*give data_dir .*/photos, if its folders"),
        (("red/a.png", "empty/a.txt"), "one class, 'red'"),
        (("red/a.txt", "blue/a.txt"), "holds class folders without images"),
        (("train/red/a.png", "train/blue/a.png", "test/reds/a.png"), "of class 'reds', of which .* mean 'red'"),
        (("train/red/a.png", "train/blue/a.png", "val/owl/a.png"), "is a val image of class 'owl', .*add some"),
        (("notes.txt",), "holds no class folders: expected"),
    ],
)
def test_folders_that_do_not_fit_say_what_to_do(tmp_path, files, says):
    for name in files:
        picture(tmp_path / name) if name.endswith(("png", "jpg")) else write(tmp_path / name)
    with pytest.raises(InputError, match=says) as refusal:
        load(tmp_path)
    assert "delete" not in str(refusal.value)
    assert "remove" not in str(refusal.value)


def test_places_that_are_no_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no class folders"):
        load(tmp_path)
    with pytest.raises(InputError, match="image_size 0"):
        load(tmp_path, image_size=0)


# classes


def test_an_empty_class_folder_is_left_out_and_said(folder):
    (folder / "green").mkdir()
    write(folder / "labels" / "a.txt")
    assert load(folder).classes == ("blue", "red")
    assert notes.noted()["classes left out"] == "no images lie in green, labels"


def test_a_class_may_be_missing_from_test(tmp_path):
    fill(tmp_path / "train", classes=("blue", "red"))
    fill(tmp_path / "test", classes=("red",))
    (tmp_path / "test" / "violet").mkdir()
    photos = read_image_folder(tmp_path, 8)
    assert photos.classes == ("blue", "red")
    said = notes.noted()
    assert said["images"] == "train 4: blue 2, red 2; test 2: blue 0, red 2"
    assert said["classes left out"] == "no images lie in violet"


def test_many_classes_are_summarised(tmp_path):
    for number in range(8):
        for i in range(3 if number else 1):
            picture(tmp_path / "train" / f"c{number}" / f"{i}.png")
        picture(tmp_path / "val" / f"c{number % 6}" / f"{number}.png")
    read_image_folder(tmp_path, 8)
    assert notes.noted()["images"] == (
        "train 22: 8 classes of 1 (c0) to 3 (c7); val 8: 6 classes of 1 (c2) to 2 (c1), none of c6, c7"
    )


def test_names_in_two_unicode_forms_are_one_class(tmp_path):
    composed, apart = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    for folder in ("train/" + composed, "train/" + apart, "train/tea", "test/" + apart):
        fill(tmp_path / Path(folder).parent, classes=(Path(folder).name,))
    photos = read_image_folder(tmp_path, 8)
    assert photos.classes == (composed, "tea")
    assert torch.bincount(photos.train.labels).tolist() == [4, 2]
    assert photos.test.labels.tolist() == [0, 0]
    assert "two Unicode forms" in notes.noted()["class names"]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_class_name_that_is_no_text_is_named(folder):
    (folder / os.fsdecode(b"gr\xfcn")).mkdir()
    with pytest.raises(InputError, match=r"the class 'gr\\udcfcn' has a name that is no UTF-8: rename it"):
        load(folder)


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (["blue", "green"], "without 'red', with new 'green'"),
        (["blue"], "knows 2 classes and the data have 1, without 'red'"),
        (["red", "blue"], "in another order"),
    ],
)
def test_classes_that_changed_since_training_are_named(now, says):
    check_same_classes(["blue", "red"], ["blue", "red"], "x")
    check_same_classes([unicodedata.normalize("NFD", "é")], [class_name("é")], "x")
    with pytest.raises(InputError, match=f"^checkpoint x .*{says}.*: give the data"):
        check_same_classes(["blue", "red"], now, "checkpoint x")


# links, and files that cannot be read


def test_links_are_followed_but_not_round_in_circles(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    fill(elsewhere, classes=("green",))
    (folder / "green").symlink_to(elsewhere / "green", target_is_directory=True)
    (folder / "up").symlink_to("..", target_is_directory=True)
    (folder / "red" / "here").symlink_to(".", target_is_directory=True)
    (folder / "red" / "top").symlink_to("..", target_is_directory=True)
    (folder / "red" / "loop").symlink_to("loop")
    photos = read_image_folder(folder, 8)
    assert photos.classes == ("blue", "green", "red")
    assert torch.bincount(photos.train.labels).tolist() == [10, 2, 10]
    said = notes.noted()
    assert "lead to folders that are read already" in said["links left out"]
    assert all(str(folder / link) in said["links left out"] for link in ("red/here", "red/top", "up"))
    assert said["classes left out"] == "no images lie in up"


def test_broken_images_are_all_named_at_once_and_nothing_is_kept(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("kept")
    whole = (folder / "red" / "0.png").read_bytes()
    write(folder / "red" / "cut.png", whole[:-30])
    with pytest.raises(InputError, match=r"red/cut\.png is not a readable image \(.*\): mend it, or move it out of"):
        load(folder, cache_dir=cache)
    write(folder / "blue" / "cut.png", whole[:-30])
    with pytest.raises(InputError, match=r"blue/cut\.png is not .*, nor is 1 other \(red/cut\.png\): mend"):
        load(folder, cache_dir=cache)
    assert not list(cache.rglob("*.safetensors"))


def test_peculiar_images_are_said(tmp_path):
    fill(tmp_path, 3)
    Image.new("RGBA", (8, 8), (*BLUE, 0)).save(tmp_path / "blue" / "clear.png")
    Image.new("RGB", (8, 8), BLUE).save(
        tmp_path / "blue" / "moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    read_image_folder(tmp_path, 8)
    said = notes.noted()
    assert said["transparent images"] == "1 of 8 are transparent in part, and lie on white"
    assert said["animated images"] == "1 of 8 hold several pictures, of which the first one counts"


@pytest.mark.parametrize(("brightest", "white"), [(255, 255), (1023, 1023), (3901, 4095)])
def test_deep_images_share_one_scale_over_all_splits(tmp_path, brightest, white):
    for split, name, value in (
        ("train", "blue", brightest // 4),
        ("train", "red", brightest // 2),
        ("test", "red", brightest),
    ):
        write(tmp_path / split / name / "a.png", deep_png(np.full((8, 8, 1), value)))
    picture(tmp_path / "train" / "red" / "8bits.png", (7, 7, 7))
    photos = read_image_folder(tmp_path, 8)
    found = sorted(photos.train.pixels[:, 0, 0, 0].tolist() + photos.test.pixels[:, 0, 0, 0].tolist())
    assert found == [7, *(round(value * 255 / white) for value in (brightest // 4, brightest // 2, brightest))]
    assert f"0 becomes black and {white} white" in notes.noted()["image depth"]


def test_a_bar_counts_the_images_that_are_looked_into_and_decoded(folder):
    bars = Bars()
    for _ in range(2):
        load(folder, bar=bars)
    assert bars.seen == [["looking into files", 20, "images", 20], ["decoding train images", 20, "images", 20]]
