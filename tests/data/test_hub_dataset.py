"""Data sets of the Hugging Face hub; the library itself is played by a stand-in where it is not installed."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hostile.limits import refused
from pictures import BLUE, RED
from PIL import Image as Picture

from fedtalos import notes
from fedtalos.data import hub_dataset
from fedtalos.data.dataset_loader import load_dataset
from fedtalos.data.hub_dataset import read_hub_dataset
from fedtalos.errors import InputError


class Image:
    """The stand-in's type of an image column."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Value:
    """The stand-in's type of a column of numbers or text."""


class ClassLabel:
    """The stand-in's type of a column of classes."""

    def __init__(self, names: list[Any]) -> None:
        self.names = names


class Rows:
    """The stand-in's table: columns by name, as a data set has them."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features
        self._fingerprint = str(hash(repr(columns)))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[column]

    def __iter__(self):
        return iter([{name: column[i] for name, column in self.columns.items()} for i in range(len(self))])

    def select_columns(self, names: list[str]) -> "Rows":
        return Rows({name: self.columns[name] for name in names}, {name: self.features[name] for name in names})

    def cast_column(self, name: str, feature: Image) -> "Rows":
        assert not feature.decode
        return self


def encoded(colour) -> dict[str, Any]:
    content = io.BytesIO()
    Picture.new("RGB", (12, 9), colour).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def rows(count: int, label="label", **more) -> Rows:
    columns = {"img": [encoded((RED, BLUE)[i % 2]) for i in range(count)], label: [i % 2 for i in range(count)]}
    features: dict[str, Any] = {"img": Image(), label: ClassLabel(["red", "blue"]), **dict.fromkeys(more, Value())}
    return Rows(columns | more, features)


@pytest.fixture
def hub(monkeypatch) -> dict[str, Any]:
    """What the stand-in's hub holds, by name."""
    held: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in held:
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nor cannot be accessed")
        return held[name]

    def builder(name: str, config: str | None) -> Any:
        kind = "json" if name.endswith("json") else "parquet"
        return SimpleNamespace(name=kind, download_and_prepare=lambda: None, as_dataset=lambda: load(name))

    config = SimpleNamespace(HF_DATASETS_CACHE="kept")
    module = SimpleNamespace(Image=Image, load_dataset_builder=builder, load_from_disk=load, config=config)
    monkeypatch.setitem(sys.modules, "datasets", module)
    notes.noted()
    return held


def test_splits_classes_and_clients_are_found(hub):
    writers = [f"w{i % 3}" for i in range(20)]
    hub["me/pets"] = {"train": rows(20, writer_id=writers), "validation": rows(4), "test": rows(6), "extra": rows(2)}
    hub["me/pets"]["more"] = rows(1)
    for _ in range(2):  # decoded, then from the cache
        data = load_dataset("hf:me/pets", image_size=8, calibration_fraction=0)
        assert data.classes == ("blue", "red")
        assert [len(data.train), len(data.val), len(data.test)] == [20, 4, 6]
        assert (data.train.pixels[:, 0, 0, 0] == np.array([BLUE[0], RED[0]])[data.train.labels]).all()
        assert data.train.owners is not None
        assert data.train.owners.bincount().tolist() == [7, 7, 6]
    said = notes.noted()
    assert said["columns"] == "images are in img, classes in label, clients in writer_id"
    assert said["splits left out"] == "extra (2 images), more (1 images) of train, validation, test and 2 more"


def test_of_several_columns_of_classes_the_usual_one_is_taken(hub):
    both = rows(8, "fine_label")
    both.columns["coarse_label"], both.features["coarse_label"] = [0] * 8, ClassLabel(["all"])
    hub["me/cifar"] = both
    assert len(read_hub_dataset("hf:me/cifar", 8).train) == 8
    assert notes.noted()["columns"] == "images are in img, classes in fine_label; coarse_label are not read"


def test_a_name_may_say_which_columns_to_read(hub):
    both = rows(8, "fine_label", who=["me"] * 3 + ["you"] * 5)
    both.columns["coarse_label"], both.features["coarse_label"] = [0, 0, 1, 1] * 2, ClassLabel(["pet", "car"])
    hub["me/cifar"] = both
    found = read_hub_dataset("hf:me/cifar,label=coarse_label,client=who", 8)
    assert found.classes == ("car", "pet")
    assert found.train.owners.bincount().tolist() == [3, 5]
    assert notes.noted()["columns"] == (
        "images are in img, classes in coarse_label, clients in who; fine_label are not read"
    )
    for named, says in {
        "image=fine_label": "found no column fine_label of images among img .Image., fine_label",
        "client=them": "found no column them of clients",
        "labels=who": "expected image=COLUMN, label=COLUMN or client=COLUMN after the comma, got labels=who",
        "label": "got label$",
    }.items():
        with pytest.raises(InputError, match=says):
            read_hub_dataset(f"hf:me/cifar,{named}", 8)


def test_labels_may_be_text_and_test_sets_may_have_none(hub):
    text, test = rows(8), rows(4)
    text.columns["label"], text.features["label"] = ["cat", "dog"] * 4, Value()
    test.columns["label"] = [-1] * 4
    hub["me/pets"] = {"train": text, "test": test}
    found = read_hub_dataset("hf:me/pets", 8)
    assert found.classes == ("cat", "dog")
    assert found.test is None
    assert notes.noted()["test left out"] == "row 0 of test has no label"


def test_what_cannot_be_read_is_refused_in_one_sentence(hub):
    hub["me/none"] = {"train": Rows({"text": ["a"]}, {"text": Value()})}
    hub["me/test"] = {"test": rows(4)}
    broken = rows(4)
    broken.columns["img"][2] = {"bytes": b"x", "path": "deep/down.jpg"}
    hub["me/broken"] = broken
    for name, says in {
        "hf:me/away": "cannot be read .Dataset 'me/away' doesn't exist on the Hub.; check its name",
        "hf:me/none": "found no column of images among text .Value.; name it: image=COLUMN",
        "hf:me/test": "expected a split called train, got test",
        "hf:me/broken": r"^dataset hf:me/broken: train/2\.jpg is not a readable image .* move it out of hf:me/broken$",
        "hf:pets": "expected hf:OWNER/NAME, or a folder",
        "hf:me/json": "its files are json: expected parquet, arrow, imagefolder, webdataset",
    }.items():
        with pytest.raises(InputError, match=says) as error:
            read_hub_dataset(name, 8)
        assert "\n" not in str(error.value)


class Torn(list[Any]):
    """A column that cannot be read."""

    def __iter__(self):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "\x1b[2J" * 1000)


LABELS: dict[str, tuple[list[Any], Any]] = {
    "no text": (Torn("ab"), Value()),
    "torn": (Torn([0, 1]), ClassLabel(["a", "b"])),
    "no class": ([0, 7], ClassLabel(["a", "b"])),
    "far from a class": ([0, 2**62], ClassLabel(["a", "b"])),
    "names that are none": ([0, 1], ClassLabel(["a", {"b": ["x"] * 1000}])),
    "no classes": ([0, 0], ClassLabel([])),
    "an empty name": (["", "b"], Value()),
    "a long name": (["x" * 10**6, "b"], Value()),
    "a surrogate": (["\ud800", "b"], Value()),
    "too many": (list(range(2**16 + 1)), Value()),
}
PATHS = [
    "/etc/passwd",
    "/dev/zero",
    "../x.png",
    "kept/../../x.png",
    "a\0b",
    "x" * 5000,
    "http://127.0.0.1/x.png",
    "\x1b[2J",
]


@pytest.mark.parametrize("what", LABELS)
def test_labels_of_any_kind_are_refused_in_one_short_sentence(what, hub):
    values, feature = LABELS[what]
    found = rows(1)
    found.columns |= {"img": found.columns["img"] * len(values), "label": values}
    found.features["label"] = feature
    hub["me/hostile"] = {"train": found}
    with refused():
        read_hub_dataset("hf:me/hostile", 8)


@pytest.mark.parametrize("path", PATHS)
def test_rows_name_no_files_but_their_own(path, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = rows(4)
    found.columns["img"][2] = {"bytes": None, "path": path}
    hub["me/hostile"] = hub["mine"] = {"train": found}
    Path("mine").mkdir()
    for name in ("hf:me/hostile", "hf:mine"):
        with refused("row 2 of train means "):
            read_hub_dataset(name, 8)


def test_rows_without_images_are_refused(hub):
    found = rows(4)
    found.select_columns = lambda names: Rows({"label": [0] * 4}, {})
    hub["me/hostile"] = {"train": found}
    with refused("cannot be read"):
        read_hub_dataset("hf:me/hostile", 8)


def test_rows_may_name_files_of_their_folder_or_of_the_cache(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = rows(4)
    for number, path in enumerate(["mine/deep/0.png", str(tmp_path / "kept/1.png")]):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_bytes(found.columns["img"][number]["bytes"])
        found.columns["img"][number] = {"bytes": None, "path": path}
    hub["mine"] = {"train": found}
    assert len(read_hub_dataset("hf:mine", 8).train) == 4


def test_names_and_columns_are_shortened(hub, monkeypatch):
    long = [str(number) + "\x1b[2J" * 1000 for number in range(99)]
    hub["me/columns"] = {"train": Rows({name: [0] for name in long}, dict.fromkeys(long, Value()))}
    hub["me/splits"] = dict.fromkeys(long, rows(1))
    for name in ("me/columns", "me/columns,label=x", "me/splits", f"me/{long[0]}", "~no/x"):
        with refused():
            read_hub_dataset(f"hf:{name}", 8)
    monkeypatch.setattr(hub_dataset, "MOST_ROWS", 7)
    hub["me/many"] = {"train": rows(8)}
    with refused("holds 8 images, of which 7 are the limit"):
        read_hub_dataset("hf:me/many", 8)


def test_only_names_are_looked_for_on_the_hub(hub):
    """The library takes others for folders, and looks into all that lies below them."""
    for name in ("../../nothing", "a/..", "-a/b", "a/b/c/d", "/nothing/there"):
        hub[name] = {"train": rows(4)}
        with refused("expected hf:OWNER/NAME"):
            read_hub_dataset(f"hf:{name}", 8)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"datasets cannot be imported .*\[datasets\]"):
        read_hub_dataset("hf:me/pets", 8)


def test_folders_are_read_by_the_library_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])})
    images = [Picture.new("RGB", (9, 9), (RED, BLUE)[i % 2]) for i in range(10)]
    one = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(10)]}, features=features)
    both = datasets.DatasetDict({"train": one, "test": one})
    both.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    for split, part in both.items():
        part.to_parquet(tmp_path / f"parquet/{split}.parquet")
        for number, image in enumerate(images):
            name = tmp_path / f"folders/{split}/{('red', 'blue')[number % 2]}/{number}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            image.save(name)
    for name in ("saved", "parquet", "folders"):
        found = read_hub_dataset(f"hf:{tmp_path / name}", 8)
        assert found.classes == ("blue", "red")
        assert found.test is not None
        assert len(found.train) == len(found.test) == 10
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_hub_dataset(f"hf:{tmp_path / 'empty'}", 8)
