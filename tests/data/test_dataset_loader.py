"""Data sets: the splits, the CIFAR files and their pickles, downloads from a local server, image folders."""

import hashlib
import io
import os
import pickle
import tarfile
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from pictures import Bars

from fedtalos.data import downloads
from fedtalos.data.dataset_loader import load_dataset
from fedtalos.data.downloads import fetch_archive, read_members
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.files import locked
from fedtalos.randomness import generator

CLASSES = ["apple", "baby", "cloud"]
SPLITS = ("train", "calibration", "val", "test")


def load(name, data_dir=Path(), *, val_fraction=0.1, calibration_fraction=0.1, seed=0, image_size=8, **download):
    return load_dataset(
        name,
        data_dir,
        val_fraction=val_fraction,
        calibration_fraction=calibration_fraction,
        seed=seed,
        image_size=image_size,
        **download,
    )


def assert_same(a: LabelledImages, b: LabelledImages) -> None:
    assert torch.equal(a.pixels, b.pixels)
    assert torch.equal(a.labels, b.labels)


def rows(images: LabelledImages) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.pixels}


# CIFAR files


def batch(per_class: int, key: str, seed: int) -> dict:
    rng = generator(seed, "pixels")
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), per_class))
    data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return {b"data": data, key.encode(): labels.tolist(), b"filenames": [b"x.png"] * len(labels)}


def cifar100_files(per_class: int = 20) -> dict[str, bytes]:
    contents = {
        "meta": {b"fine_label_names": [name.encode() for name in CLASSES]},
        "train": batch(per_class, "fine_labels", 1),
        "test": batch(5, "fine_labels", 2),
    }
    return {name: pickle.dumps(content, protocol=2) for name, content in contents.items()}


def archive_of(files: dict[str, bytes], folder: str = "cifar-100-python") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def cifar(tmp_path) -> Path:
    write(tmp_path / "cifar-100-python", cifar100_files())
    return tmp_path


def test_cifar_pixels_are_channel_planes_and_labels_fine(cifar):
    published = batch(5, "fine_labels", 2)
    test = load("cifar100", cifar).test
    assert test.pixels.dtype == torch.uint8
    assert test.pixels.shape == (15, 3, 32, 32)
    assert test.labels.tolist() == published[b"fine_labels"]
    red, row, column = 0, 3, 7
    assert test.pixels[4, red, row, column] == published[b"data"][4, 1024 * red + 32 * row + column]
    assert test.pixels[4, 2, row, column] == published[b"data"][4, 2048 + 32 * row + column]


def test_files_archive_and_download_give_the_same(cifar, tmp_path_factory):
    def no_download(name, folder, bar):
        raise AssertionError("files that are there are used")

    def fake_download(name, folder, bar):
        (folder / name).write_bytes(archive_of(cifar100_files()))
        return folder / name

    here = load("cifar100", cifar, download=no_download)
    direct = load("cifar100", cifar / "cifar-100-python", download=no_download)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    downloaded = load("cifar100", elsewhere, download=fake_download)
    archived = load("cifar100", elsewhere, download=no_download)
    assert here.classes == tuple(CLASSES)
    assert {d.fingerprint for d in (here, direct, downloaded, archived)} == {here.fingerprint}
    assert [file.name for file in elsewhere.iterdir()] == ["cifar-100-python.tar.gz"]


def test_cifar10_joins_its_batches(tmp_path):
    files = {f"data_batch_{i}": pickle.dumps(batch(4, "labels", i), protocol=2) for i in range(1, 6)}
    files["test_batch"] = pickle.dumps(batch(2, "labels", 6), protocol=2)
    files["batches.meta"] = pickle.dumps({b"label_names": CLASSES}, protocol=2)
    write(tmp_path / "cifar-10-batches-py", files)
    dataset = load("cifar10", tmp_path)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [49, 5, 6, 6]


def test_an_array_pickled_by_python_2_is_read(cifar):
    """Protocol 2 with string opcodes, as the published files are."""
    text = b"c\x00" * 1536
    pickled = (
        b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b"
        b"\x87Rq\x04(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff"
        b"\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(text).to_bytes(4, "little")
        + text
        + b"tbU\x0bfine_labelsq\x07]K\x02au."
    )
    write(cifar / "cifar-100-python", {"test": pickled})
    test = load("cifar100", cifar).test
    assert test.labels.tolist() == [2]
    assert bytes(test.pixels.flatten().tolist()) == text


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "make",
    [
        lambda marker: Hostile(marker),
        lambda marker: np.dtype,  # admitted alone, but no dictionary
        lambda marker: {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": partial(int)},
    ],
)
def test_hostile_pickles_run_nothing(cifar, make):
    marker = cifar / "marker"
    write(cifar / "cifar-100-python", {"train": pickle.dumps(make(marker), protocol=2)})
    with pytest.raises(InputError, match="cifar-100-python/train"):
        load("cifar100", cifar)
    assert not marker.exists()


def test_hostile_pickle_names_what_it_asks_for(cifar):
    write(cifar / "cifar-100-python", {"meta": b"cbuiltins\neval\n(U\x011tR."})
    with pytest.raises(InputError, match=r"meta asks for builtins\.eval"):
        load("cifar100", cifar)


def test_codecs_are_admitted_for_latin1_only(cifar):
    write(cifar / "cifar-100-python", {"meta": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR."})
    with pytest.raises(InputError, match="codec"):
        load("cifar100", cifar)


def changed(**fields) -> bytes:
    content = {name.encode(): value for name, value in fields.items()}
    return pickle.dumps(batch(20, "fine_labels", 1) | content, protocol=2)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("train", b"", "cannot be read"),
        ("train", cifar100_files()["train"][:-2000], "cannot be read"),
        ("train", b"\x00 not a pickle", "cannot be read"),
        ("train", pickle.dumps([1, 2], protocol=2), "no dictionary"),
        ("train", changed(data=np.zeros((60, 3071), np.uint8)), "3 x 32 x 32"),
        ("train", changed(data=np.zeros((60, 3072), np.int64)), "3 x 32 x 32"),
        ("train", changed(data=[[0] * 3072] * 60), "3 x 32 x 32"),
        ("train", changed(fine_labels=[0] * 59), "per image"),
        ("train", changed(fine_labels=[0] * 59 + [3]), r"outside 0\.\.2"),
        ("train", changed(fine_labels=[-1] + [0] * 59), r"outside 0\.\.2"),
        ("train", changed(fine_labels=["apple"] * 60), r"outside 0\.\.2"),
        ("test", changed(fine_labels=None), "per image"),
        ("meta", pickle.dumps({b"fine_label_names": []}, protocol=2), "class names"),
        ("meta", pickle.dumps({b"label_names": CLASSES}, protocol=2), "class names"),
    ],
)
def test_nonsense_in_a_cifar_file_is_named(cifar, file, content, says):
    write(cifar / "cifar-100-python", {file: content})
    with pytest.raises(InputError, match=rf"cifar-100-python/{file} .*{says}"):
        load("cifar100", cifar)


@pytest.mark.parametrize("keep", [0, 100, 3000, -20])
def test_a_truncated_archive_is_refused(tmp_path, keep):
    write(tmp_path, {"cifar-100-python.tar.gz": archive_of(cifar100_files())[:keep]})
    with pytest.raises(InputError, match=r"cifar-100-python\.tar\.gz (is damaged|lacks)"):
        load("cifar100", tmp_path)


def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path):
    content = bytearray(archive_of(cifar100_files()))
    content[-8] ^= 1  # in gzip's checksum, as good as anywhere
    write(tmp_path, {"cifar-100-python.tar.gz": bytes(content)})
    with pytest.raises(InputError, match="is damaged"):
        load("cifar100", tmp_path)


def test_an_archive_gives_up_only_the_expected_files(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("folder/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("../outside", "folder/file"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ok"))
    assert read_members(archive, {"folder/file"}) == {"folder/file": b"ok"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]
    with pytest.raises(InputError, match="lacks folder/link"):
        read_members(archive, {"folder/link"})


# splits


def test_digits_splits_are_stratified_disjoint_and_in_stored_order():
    dataset = load("digits")
    from sklearn.datasets import load_digits

    stored = [np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images]
    assert [len(getattr(dataset, name)) for name in SPLITS] == [1165, 129, 144, 359]  # a fifth for test, then tenths
    positions = []
    for name in SPLITS:
        images = getattr(dataset, name)
        at = [stored.index(image[0].numpy().tobytes()) for image in images.pixels]
        assert at == sorted(at)
        positions += at
        shares = torch.bincount(images.labels, minlength=10) / len(images)
        assert (shares - 0.1).abs().max() < 0.01
    assert sorted(positions) == list(range(1797))
    assert dataset.train.pixels.shape[1:] == (3, 8, 8)
    assert dataset.train.pixels.max() == 255
    assert dataset.classes == tuple("0123456789")


def test_the_seed_moves_validation_but_never_test():
    first, again, other = load("digits"), load("digits"), load("digits", seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert_same(first.test, other.test)
    assert not torch.equal(first.val.pixels, other.val.pixels)


def test_calibration_does_not_move_validation(cifar):
    with_it, without = load("cifar100", cifar), load("cifar100", cifar, calibration_fraction=0)
    assert_same(with_it.val, without.val)
    assert len(without.calibration) == 0
    assert rows(with_it.train) | rows(with_it.calibration) == rows(without.train)


def test_a_name_alone_is_enough_and_an_unknown_one_lists_the_known():
    dataset = load_dataset("digits")
    assert [len(getattr(dataset, name)) for name in SPLITS] == [1268, 26, 144, 359]
    with pytest.raises(InputError, match="name 'cifar': expected one of cifar100, cifar10, digits, folder"):
        load_dataset("cifar")


@pytest.mark.parametrize("fraction", [1.0, -0.1, float("nan")])
def test_calibration_fraction_lies_between_0_and_1(fraction):
    with pytest.raises(InputError, match="calibration_fraction"):
        load("digits", calibration_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_val_fraction_lies_between_0_and_1(fraction):
    with pytest.raises(InputError, match="val_fraction"):
        load("digits", val_fraction=fraction)


def test_splits_that_leave_nothing_are_refused(tmp_path):
    write(tmp_path, cifar100_files(per_class=2))
    with pytest.raises(InputError, match="is none"):
        load("cifar100", tmp_path, val_fraction=0.05)
    with pytest.raises(InputError, match=r"val_fraction 0\.9 leaves class"):
        load("cifar100", tmp_path, val_fraction=0.9)


def test_subset_takes_tensors_and_arrays():
    images = LabelledImages(torch.arange(4 * 3, dtype=torch.uint8).view(4, 3, 1, 1), torch.arange(4))
    assert_same(images.subset(torch.tensor([3, 1])), images.subset(np.array([3, 1])))
    assert images.subset(np.array([3, 1])).labels.tolist() == [3, 1]
    assert len(images.to("cpu")) == 4


# downloads


class Server(ThreadingHTTPServer):
    """Serves ``content`` as any file; ``plan`` says how, one entry a request, then "whole" or "range"."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.plan: list[str] = []
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, wanted = self.server.content, self.headers["Range"]
        self.server.ranges.append(wanted)
        mode = self.server.plan.pop(0) if self.server.plan else "range"
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and mode != "whole" else 0
        if mode == "missing":
            self.send_error(404)
            return
        if wanted and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if mode != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : len(content) // 2 if mode == "cut" else None])

    def log_message(self, *args) -> None:
        pass


CONTENT = generator(0, "content").bytes(2**20)  # four chunks
CHECKSUMS = {"a.tar.gz": f"md5:{hashlib.md5(CONTENT).hexdigest()}"}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)  # pooch waits 1, 2, 3 s between tries
    with Server(CONTENT) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def fetch(server, folder):
    return fetch_archive("a.tar.gz", folder, base_url=server.url, checksums=CHECKSUMS)


def only_file(folder: Path) -> bytes:
    (file,) = folder.iterdir()
    assert file.name == "a.tar.gz"
    return file.read_bytes()


@pytest.mark.parametrize("mode", ["range", "no length"])
def test_a_fresh_download(server, tmp_path, mode):
    server.plan = [mode]
    assert fetch(server, tmp_path / "new") == tmp_path / "new" / "a.tar.gz"
    assert only_file(tmp_path / "new") == CONTENT
    assert server.ranges == [None]


def test_a_cut_download_resumes_by_itself(server, tmp_path):
    server.plan = ["cut"]
    fetch(server, tmp_path)
    assert only_file(tmp_path) == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_bar_counts_bytes_with_those_of_an_earlier_download(server, tmp_path):
    bars, size = Bars(), len(CONTENT)
    server.plan = ["cut", "no length"]
    fetch_archive("a.tar.gz", tmp_path, bars, base_url=server.url, checksums=CHECKSUMS)
    assert bars.seen == [["a.tar.gz", size, "bytes", size // 2], ["a.tar.gz", None, "bytes", size]]


def test_the_next_run_resumes_too(server, tmp_path):
    server.plan = ["cut", "missing", "missing", "missing"]
    with pytest.raises(InputError, match="answered 404"):
        fetch(server, tmp_path)
    assert (tmp_path / "a.tar.gz.part").read_bytes() == CONTENT[: len(CONTENT) // 2]
    fetch(server, tmp_path)
    assert only_file(tmp_path) == CONTENT
    assert server.ranges[-1] == f"bytes={len(CONTENT) // 2}-"


def test_a_server_that_ignores_ranges(server, tmp_path):
    server.plan = ["cut", "whole"]
    fetch(server, tmp_path)
    assert only_file(tmp_path) == CONTENT


@pytest.mark.parametrize(
    ("part", "requests"),
    [
        (CONTENT, 1),  # complete: 416, nothing is missing
        (CONTENT + b"more", 2),  # too long: 416, a wrong checksum, afresh
        (b"something else", 2),  # resumed, a wrong checksum, afresh
    ],
)
def test_whatever_part_lies_there(server, tmp_path, part, requests):
    write(tmp_path, {"a.tar.gz.part": part})
    fetch(server, tmp_path)
    assert only_file(tmp_path) == CONTENT
    assert len(server.ranges) == requests


def test_of_several_processes_one_downloads_and_the_others_wait(server, tmp_path):
    with ExitStack() as another:
        another.enter_context(locked(tmp_path / ".a.tar.gz.lock"))
        titles = []

        @contextmanager
        def bar(title, total, unit):
            titles.append(title)
            if title.startswith("waiting"):
                write(tmp_path, {"a.tar.gz": CONTENT})
                another.close()
            yield lambda count: None

        fetch_archive("a.tar.gz", tmp_path, bar, base_url=server.url, checksums=CHECKSUMS)
    assert titles == ["waiting for a run that downloads a.tar.gz"]
    assert only_file(tmp_path) == CONTENT
    assert server.ranges == []


def test_a_wrong_checksum_is_refused_and_nothing_stays(server, tmp_path):
    server.content = b"another file"
    with pytest.raises(InputError, match=r"a\.tar\.gz could not be fetched .*checksum.*data_dir"):
        fetch(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_down_is_one_sentence_and_leaves_no_folder(server, tmp_path):
    server.server_close()
    with pytest.raises(InputError, match=rf"a\.tar\.gz could not be fetched from {server.url} \(no connection"):
        fetch(server, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_load_dataset_downloads_where_nothing_lies(server, tmp_path, monkeypatch):
    server.content = archive_of(cifar100_files())
    checksums = {"cifar-100-python.tar.gz": f"md5:{hashlib.md5(server.content).hexdigest()}"}
    dataset = load("cifar100", tmp_path, download=partial(fetch_archive, base_url=server.url, checksums=checksums))
    assert len(dataset.test) == 15
    assert set(downloads.CHECKSUMS) == {"cifar-100-python.tar.gz", "cifar-10-python.tar.gz"}


# the real thing


@pytest.mark.slow
def test_the_published_cifar100():
    candidates = [Path(os.environ.get("FEDTALOS_DATA", "data")), Path("data")]
    found = [folder for folder in candidates if (folder / "cifar-100-python" / "train").exists()]
    if not found:
        pytest.skip("no cifar-100-python under $FEDTALOS_DATA or ./data")
    dataset = load("cifar100", found[0], calibration_fraction=0)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [45_000, 0, 5_000, 10_000]
    assert len(dataset.classes) == 100
    assert dataset.classes[:2] == ("apple", "aquarium_fish")
    assert torch.equal(torch.bincount(dataset.val.labels), torch.full((100,), 50))
    mean = dataset.train.pixels[::10].float().mean(dim=(0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.5071, 0.4866, 0.4409]), atol=0.005)  # the field's figures
