"""CSV files of path and label, with clients and splits: what is read, kept and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import BLUE, RED, picture, write

from fedtalos import notes
from fedtalos.data import image_table
from fedtalos.data.dataset_loader import load_dataset
from fedtalos.data.image_table import read_image_table, table_layout
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.training.federated.partition import split_clients
from fedtalos.training.federated.tasks import split_by_task


@pytest.fixture(autouse=True)
def no_notes_of_others():
    notes.noted()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of twenty images, red and blue by turns."""
    for i in range(20):
        picture(tmp_path / "img" / f"{i}.png", (RED, BLUE)[i % 2])
    return tmp_path


def table(folder: Path, rows: list[str], header="path,label", name="labels.csv") -> Path:
    return write(folder / name, ("\n".join([header, *rows]) + "\n").encode())


def rows_of(numbers, ending="") -> list[str]:
    return [f"img/{i}.png,{('red', 'blue')[i % 2]}{ending}" for i in numbers]


def test_a_table_is_read_as_a_folder_is_and_kept_likewise(pictures, monkeypatch):
    path = table(pictures, rows_of(range(20)))
    data = load_dataset("csv", path, image_size=8, calibration_fraction=0)
    assert data.classes == ("blue", "red")
    assert [len(data.train), len(data.val), len(data.test)] == [14, 2, 4]
    assert (data.train.pixels[:, 0, 0, 0] == np.array([BLUE[0], RED[0]])[data.train.labels]).all()
    assert data.train.owners is None
    said = notes.noted()
    assert said["images"] == "train 20: blue 10, red 10"
    assert "a split called test" in said["test images"]
    monkeypatch.setattr("fedtalos.data.image_folder.decode_folder", None)  # what is kept is not decoded
    assert load_dataset("csv", path, image_size=8, calibration_fraction=0).fingerprint == data.fingerprint


def test_the_order_of_rows_and_a_spreadsheets_mark_change_nothing(pictures):
    straight = read_image_table(table(pictures, rows_of(range(20))), 8)
    other = write(pictures / "b.csv", ("\ufeffpath,label\r\n" + "\r\n".join(rows_of(range(19, -1, -1)))).encode())
    assert (read_image_table(other, 8).train.pixels == straight.train.pixels).all()


def test_splits_have_synonyms_and_paths_may_be_absolute(pictures, tmp_path_factory):
    elsewhere = picture(tmp_path_factory.mktemp("elsewhere") / "a.png", BLUE)
    rows = [*rows_of(range(8), ",training"), *rows_of(range(8, 12), ",Val"), *rows_of(range(12, 14), ",test")]
    path = table(pictures, [*rows, f"{elsewhere},blue,test"], "path,label,split")
    found = read_image_table(path, 8)
    assert found.val is not None
    assert found.test is not None
    assert [len(found.train), len(found.val), len(found.test)] == [8, 4, 3]


def test_clients_are_kept_through_splits_and_the_cache(pictures):
    rows = [f"{row},{(10, 9, 2)[i % 3]}" for i, row in enumerate(rows_of(range(20)))]
    path = table(pictures, rows, "path,label,client")
    for _ in range(2):  # decoded, then from the cache
        data = load_dataset("csv", path, image_size=8, calibration_fraction=0.1)
        assert data.train.owners is not None
        clients = split_clients(data.train, 100, "given")
        assert len(clients) == 3
        assert sum(clients.sizes) == len(data.train) == 13
        assert (clients.owner == data.train.owners.numpy()).all()
    assert "the data name 3, of 6 to 7 training images (2, 9, 10)" in notes.noted()["clients"]
    layout = table_layout(path)
    assert layout.owners is not None
    assert layout.owners[pictures / "img" / "0.png"] == 2  # 10 comes after 9: all are numbers
    first = data.train.slice(0, 5)
    assert first.owners is not None
    assert (first.owners == data.train.owners[:5]).all()
    with pytest.raises(InputError, match="a task has clients of its own"):
        split_by_task(data.train, 3, ((0,), (1,)), "given")


def test_clients_without_training_images_are_left_out(pictures):
    rows = [*rows_of(range(10), ",a"), *rows_of(range(10, 14), ",b"), *rows_of(range(14, 20), ",c")]
    train = read_image_table(table(pictures, rows, "path,label,client"), 8).train
    assert train.owners is not None
    clients = split_clients(train.subset(np.flatnonzero(train.owners.numpy() != 1)), 1, "given")
    assert clients.sizes.tolist() == [10, 6]


def test_a_client_counts_for_training_images_alone(pictures):
    rows = [*rows_of(range(10), ",a,train"), *rows_of(range(10, 20), ",,test")]
    found = read_image_table(table(pictures, rows, "path,label,client,split"), 8)
    assert found.test is not None
    assert found.train.owners is not None
    assert found.test.owners is None


def test_files_that_are_no_images_are_left_out_and_broken_ones_refused(pictures):
    write(pictures / "notes.txt")
    path = table(pictures, [*rows_of(range(4)), "notes.txt,red"])
    assert len(read_image_table(path, 8).train) == 4
    assert notes.noted()["left out"] == "files that are no images: 1 (1 .txt)"
    write(pictures / "img" / "3.png")
    with pytest.raises(InputError, match=r"3\.png is not a readable image .* move it out of \S+labels\.csv"):
        read_image_table(path, 8)


BAD = {
    "no label column": (["img/0.png,1"], "path,number", "expected the columns path, label"),
    "no rows": ([], "path,label", "names no images"),
    "torn": (["img/0.png,red", "img/1.png"], "path,label", "line 3: expected a path and a label"),
    "no label": (["img/0.png,red", "img/1.png, "], "path,label", "row 2: img/1.png has no label"),
    "no file": (["img/0.png,red", "img/77.png,blue", "img,red"], "path,label", r"not there \(row 2: 'img/77.png', row"),
    "out of the folder": (["../a.png,red"], "path,label", "row 1: '../a.png' leads out of"),
    "empty path": ([",red"], "path,label", "files that are not there"),
    "twice": (["img/0.png,red", "img/1.png,blue", "./img/0.png,red"], "path,label", "rows 1 and 3 name one image"),
    "another split": (["img/0.png,red,later"], "path,label,split", "row 1: expected the split train, val or test"),
    "a split for some": (["img/0.png,red,test", "img/1.png,blue,"], "path,label,split", "row 2: expected the split"),
    "test alone": (["img/0.png,red,test"], "path,label,split", "names no training images"),
    "a client for some": (
        ["img/0.png,red,a", "img/1.png,blue,"],
        "path,label,client",
        "row 2: a training image without",
    ),
    "one class": (["img/0.png,red", "img/2.png,red"], "path,label", "holds images of one class, 'red'"),
    "unknown label of test": (
        ["img/0.png,red,train", "img/1.png,blue,train", "img/2.png,rad,test"],
        "path,label,split",
        "is a test image of class 'rad'.*did you mean 'red'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused_in_one_sentence(pictures, case):
    rows, header, says = BAD[case]
    with pytest.raises(InputError, match=says) as error:
        read_image_table(table(pictures, rows, header), 8)
    assert "\n" not in str(error.value)


def test_tables_that_are_no_text_or_huge_are_refused(pictures, monkeypatch):
    with pytest.raises(InputError, match="not a readable CSV file"):
        read_image_table(write(pictures / "a.csv", b"path,label\n\xff\xfe,red\n"), 8)
    with pytest.raises(InputError, match="cannot be read"):
        read_image_table(pictures, 8)
    monkeypatch.setattr(image_table, "MOST_ROWS", 3)
    with pytest.raises(InputError, match="expected 3 rows at most"):
        read_image_table(table(pictures, rows_of(range(4))), 8)
    monkeypatch.setattr(image_table, "MOST_BYTES", 50)
    with pytest.raises(InputError, match="of which 50 are the limit"):
        read_image_table(table(pictures, rows_of(range(4))), 8)


def test_other_data_name_no_clients():
    with pytest.raises(InputError, match="partition given: the data name no clients"):
        split_clients(LabelledImages(torch.zeros(4, 3, 1, 1, dtype=torch.uint8), torch.arange(4) % 2), 4, "given")
