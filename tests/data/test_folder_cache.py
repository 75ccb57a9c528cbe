"""The cache of decoded images: read until a file changes, bounded, cleaned, and no trouble where it cannot be had."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from pictures import BLUE, RED, picture, write
from safetensors import safe_open
from safetensors.torch import save_file

from fedtalos import notes
from fedtalos.data import folder_cache, folder_decoding
from fedtalos.data.folder_cache import cache_folder
from fedtalos.data.image_folder import read_image_folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return some_photos(tmp_path / "photos")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def some_photos(folder: Path) -> Path:
    for name, colour in (("blue", BLUE), ("red", RED)):
        for number in range(3):
            picture(folder / name / f"{number}.png", colour, size=(8, 8))
    return folder


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "images").glob("*.safetensors"))


def read(folder: Path, cache: Path, size: int = 8):
    notes.noted()
    return read_image_folder(folder, size, cache_dir=cache)


def decoded_again(monkeypatch, folder: Path, cache: Path, size: int = 8) -> bool:
    calls = []
    with monkeypatch.context() as patch:
        decode = folder_decoding.decode_image
        patch.setattr(folder_decoding, "decode_image", lambda *a, **k: calls.append(a) or decode(*a, **k))
        read(folder, cache, size)
    return bool(calls)


def test_the_cache_is_read_until_a_file_changes(photos, cache, monkeypatch):
    first = read(photos, cache).train
    assert not decoded_again(monkeypatch, photos, cache)
    assert torch.equal(read(photos, cache).train.pixels, first.pixels)
    stat = (photos / "red" / "0.png").stat()
    picture(photos / "red" / "0.png", (250, 10, 21), size=(8, 8))
    assert (photos / "red" / "0.png").stat().st_size == stat.st_size
    os.utime(photos / "red" / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as an archive would set it
    assert not torch.equal(read(photos, cache).train.pixels, first.pixels)
    for change in (
        lambda: picture(photos / "red" / "new.png"),
        lambda: write(photos / "red" / "notes.txt"),
        lambda: (photos / "red" / "1.png").unlink(),
        lambda: (photos / "red").rename(photos / "violet"),
    ):
        change()
        assert decoded_again(monkeypatch, photos, cache)
        assert not decoded_again(monkeypatch, photos, cache)
    assert len(kept(cache)) == 1  # what it replaced is gone


def test_nothing_is_written_into_the_data(photos, cache):
    before = sorted(photos.rglob("*"))
    photos.chmod(0o555)
    read(photos, cache)
    assert sorted(photos.rglob("*")) == before
    assert notes.noted()["image cache"] == f"decoded images are kept in {cache / 'images'}, 20 GB of them at most"


def test_folders_and_sizes_have_entries_of_their_own(photos, cache, tmp_path, monkeypatch):
    twin = some_photos(tmp_path / "twin")
    for folder, size in ((photos, 8), (photos, 4), (twin, 8)):
        assert read(folder, cache, size).train.pixels.shape == (6, 3, size, size)
    assert [path.name.split("px_")[0] for path in kept(cache)] == ["photos_4", "photos_8", "twin_8"]
    assert not decoded_again(monkeypatch, photos, cache)


def with_labels(file: Path, labels: torch.Tensor) -> None:
    with safe_open(file, "pt") as entry:
        pixels, facts = entry.get_tensor("train_pixels").clone(), entry.metadata()
    save_file({"train_pixels": pixels, "train_labels": labels}, file, facts)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda file: file.write_bytes(file.read_bytes()[:50]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes().replace(b"train_labels", b"train_lapels")),
        lambda file: file.write_bytes(file.read_bytes().replace(b"classes", b"clashes")),
        lambda file: with_labels(file, torch.tensor([0, 0, 0, 1, 1, 2])),
        lambda file: with_labels(file, torch.tensor([0, 0, 0, 1, 1, -1])),
        lambda file: with_labels(file, torch.tensor([0, 0, 0, 1, 1])),
        lambda file: with_labels(file, torch.tensor([0.0, 0, 0, 1, 1, 1])),
    ],
)
def test_an_entry_that_is_broken_is_made_again(photos, cache, break_it):
    first = read(photos, cache).train
    (file,) = kept(cache)
    break_it(file)
    again = read(photos, cache).train
    assert torch.equal(again.pixels, first.pixels)
    assert torch.equal(again.labels, first.labels)


def test_training_goes_on_where_the_cache_cannot_be_written(photos, tmp_path, monkeypatch):
    in_the_way = write(tmp_path / "file")
    assert len(read(photos, in_the_way).train) == 6
    assert "could not be kept" in notes.noted()["image cache"]
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr(folder_cache, "save_file", lambda *a: (_ for _ in ()).throw(full))
        assert len(read(photos, tmp_path / "full").train) == 6
        assert "No space left on device" in notes.noted()["image cache"]
        assert not list((tmp_path / "full" / "images").glob(".*.part"))
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 100})
        patch.setattr(folder_cache.shutil, "disk_usage", lambda _: usage)
        assert len(read(photos, tmp_path / "nearly").train) == 6
        assert "are free in" in notes.noted()["image cache"]
    assert not kept(tmp_path / "full")
    assert not kept(tmp_path / "nearly")


def test_the_least_recently_used_goes_when_the_limit_is_reached(photos, cache, tmp_path, monkeypatch):
    others = [some_photos(tmp_path / name) for name in ("a", "b")]
    for age, folder in enumerate((photos, *others)):
        read(folder, cache)
        newest = max(kept(cache), key=lambda path: path.stat().st_ctime_ns)
        os.utime(newest, (1e9 - age, 1e9 - age))  # b is the oldest
    size = max(path.stat().st_size for path in kept(cache))
    monkeypatch.setattr(folder_cache, "LIMIT", 3 * size)
    read(others[1], cache)  # used now
    read(some_photos(tmp_path / "c"), cache)
    assert [path.name[:2] for path in kept(cache)] == ["b_", "c_", "ph"]
    monkeypatch.setattr(folder_cache, "LIMIT", 100)
    assert len(read(some_photos(tmp_path / "d"), cache).train) == 6
    assert "are more than its" in notes.noted()["image cache"]
    assert len(kept(cache)) == 3


def test_what_killed_runs_left_is_removed_when_it_is_old(photos, cache):
    old, new = (write(cache / "images" / name) for name in (".x.1.part", ".y.2.part"))
    lock = write(cache / "images" / ".z.lock")
    day_before = time.time() - 2 * folder_cache.DAY
    for path in (old, lock):
        os.utime(path, (day_before, day_before))
    read(photos, cache)
    assert not old.exists()
    assert not lock.exists()
    assert new.exists()


def test_what_a_killed_run_left_of_the_same_images_is_removed_at_once(photos, cache):
    read(photos, cache)
    (entry,) = kept(cache)
    entry.unlink()
    left, others = (write(cache / "images" / f".{name}.1.part") for name in (entry.name, f"my_{entry.name}"))
    read(photos, cache)
    assert not left.exists()
    assert others.exists()
    assert kept(cache) == [entry]


def test_where_nothing_can_be_locked_nothing_is_removed_and_nobody_waits(photos, cache, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    read(photos, cache)
    (entry,) = kept(cache)
    entry.unlink()
    left = write(cache / "images" / f".{entry.name}.1.part")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    assert len(read(photos, cache).train) == 6
    assert left.exists()


def test_runs_that_start_together_decode_once(photos, cache, monkeypatch):
    calls, together = [], threading.Barrier(3)
    decode = folder_decoding.decode_image
    monkeypatch.setattr(folder_decoding, "decode_image", lambda *a, **k: calls.append(a) or decode(*a, **k))
    found = []

    def run() -> None:
        together.wait()
        found.append(read_image_folder(photos, 8, cache_dir=cache))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(calls) == 6


def test_where_the_cache_lies(monkeypatch, tmp_path):
    assert cache_folder(tmp_path) == tmp_path / "images"
    monkeypatch.setenv("FEDTALOS_CACHE", str(tmp_path / "env"))
    assert cache_folder() == tmp_path / "env" / "images"
    monkeypatch.setenv("FEDTALOS_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder().is_absolute()
    monkeypatch.setattr(folder_cache.platformdirs, "user_cache_dir", lambda *a, **k: "~/.cache/fedtalos")
    assert not cache_folder().parent.exists() or not cache_folder().parent.is_dir()


def test_an_old_cache_in_the_data_is_ignored(photos, cache):
    write(photos / ".fedtalos_cache" / "8px_0.safetensors", b"old")
    assert len(read(photos, cache).train) == 6
    assert (photos / ".fedtalos_cache" / "8px_0.safetensors").read_bytes() == b"old"
