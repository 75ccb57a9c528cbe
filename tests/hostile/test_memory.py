"""Memory follows the file: small files that would become large, and large ones that hold nothing, by what makes it so.

Each generator below is one way to ask for much with little. Whatever it makes is read, or refused in a sentence, within
so many megabytes.
"""

import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from limits import memory, refused, refused_if_at_all
from material import changed_mask, resized_header, write
from PIL import Image

from fedtalos.app.config.files import read_yaml
from fedtalos.app.figures.records import read_history, read_report
from fedtalos.app.report.contents import client_accuracies
from fedtalos.app.run import split_file
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import COLUMNS, _whole_rows
from fedtalos.app.run.split_file import counts_shown, read_split
from fedtalos.app.sweep.grid import Grid, expand
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.data import cifar
from fedtalos.data.cifar import CIFAR, _unpickled, read_cifar
from fedtalos.data.downloads import read_members
from fedtalos.data.image_folder import read_image_folder
from fedtalos.facts import memory_up_to, read_table
from fedtalos.files import UNSEALED, sealed
from fedtalos.models.heads import read_head
from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.models.weights.checkpoints import checkpoint_weights
from fedtalos.models.weights.read import load_weights
from fedtalos.training.editing.describe import density_table
from fedtalos.training.editing.mask_facts import facts_of
from fedtalos.training.editing.mask_file import read_mask_file, write_mask_file

FOLDER = "cifar-100-python"
MILLION = 10**6


# pickles of CIFAR


def text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


TEXT = text(b"a" * MILLION) + b"q\x01" + text(b"latin1") + b"q\x02"
"""A text, and the name of an encoding; 1 and 2 in the pickle's memo."""
BYTES_OF_A_TEXT = b"(c_codecs\nencode\nq\x00" + TEXT + b"h\x00h\x01h\x02\x86R"
A_KIND = b"cnumpy\nndarray\nq\x04cnumpy\ndtype\nU\x02u1\x85Rq\x05"
AN_ARRAY = b"h\x04)R(K\x01J\x40\x42\x0f\x00\x85h\x05\x89h\x03tb"
PICKLES: dict[str, Callable[[], bytes]] = {
    "a long bytearray": lambda: b"\x80\x05\x96" + struct.pack("<Q", 3 * 10**9) + b".",
    "lists": lambda: b"\x80\x02" + b"]" * (5 * MILLION) + b".",
    "dictionaries": lambda: b"\x80\x02" + b"}" * MILLION + b".",
    "lists in lists": lambda: b"\x80\x02" + b"]" * MILLION + b"a" * MILLION + b".",
    "copies of a text": lambda: b"\x80\x02" + BYTES_OF_A_TEXT + b"h\x00h\x01h\x02\x86R" * 3000 + b"l.",
    "copies of an array": lambda: b"\x80\x02" + BYTES_OF_A_TEXT + b"q\x03" + A_KIND + AN_ARRAY * 3000 + b"l.",
    "a frame": lambda: b"\x80\x04\x95" + struct.pack("<Q", 3 * 10**9) + b".",
    "a long number": lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "a text longer than the file": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 3 * 10**9) + b".",
    "a memo far off": lambda: b"\x80\x02]r\xff\xff\xff\xff.",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(kind, monkeypatch):
    if kind in ("dictionaries", "lists in lists"):
        monkeypatch.setattr(cifar, "MOST_STEPS", 2**18)
    content = PICKLES[kind]()
    with memory(250), refused_if_at_all():
        _unpickled(content, "train")


@pytest.mark.parametrize(
    "names", [[b"x"] * 300_000, ["x" * MILLION] * 2, ["\udce9", "b"], ["a\0", "b"], [b"x" * 256] * 2]
)
def test_class_names(names, tmp_path):
    batch = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]}, 2)
    meta = pickle.dumps({b"fine_label_names": names}, 3)
    for name, content in (("meta", meta), ("train", batch), ("test", batch)):
        write(str(tmp_path / name), content)
    with memory(100), refused_if_at_all():
        read_cifar(CIFAR["cifar100"], tmp_path, lambda *_: tmp_path)


# archives


def an_archive(*headers: bytes, packed_zeros: int = 0) -> bytes:
    """A packed archive of these blocks, then so many packed zeros."""
    content = io.BytesIO()
    with gzip.GzipFile(fileobj=content, mode="wb") as packed:
        for block in headers:
            packed.write(block)
        for _ in range(packed_zeros // 2**20):
            packed.write(bytes(2**20))
        packed.write(bytes(1024))
    return content.getvalue()


def a_header(
    size: int = 0, kind: bytes = tarfile.REGTYPE, name: str = f"{FOLDER}/train", longer: dict[str, str] | None = None
) -> bytes:
    """A member's header, or a longer one that beats it; a negative size is written as tar writes large ones."""
    member = tarfile.TarInfo(name)
    member.type, member.size, member.pax_headers = kind, max(size, 0), longer or {}
    if longer:
        body = b"".join(b"%d %s=%s\n" % (len(k) + len(v) + 5, k.encode(), v.encode()) for k, v in longer.items())
        extended = tarfile.TarInfo("pax")
        extended.type, extended.size = tarfile.XHDTYPE, len(body)
        return extended.tobuf(tarfile.USTAR_FORMAT) + body.ljust(512, b"\0") + tarfile.TarInfo(name).tobuf()
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        header[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3000000000"}
LONG_NAME = a_header(100, b"L", name="././@LongLink") + b"a" * 100 + bytes(412)
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a negative size": lambda: an_archive(a_header(-512)),
    "a negative size of another member": lambda: an_archive(a_header(-512, name="x")),
    "a negative size in a longer header": lambda: an_archive(a_header(longer={"size": "-512"})),
    "an absurd size in a longer header": lambda: an_archive(a_header(longer={"size": "9" * 30})),
    "an absurd size": lambda: an_archive(a_header(2**60)),
    "a sparse file": lambda: an_archive(a_header(512, b"S") + bytes(512)),
    "a sparse file in a longer header": lambda: an_archive(a_header(longer=SPARSE) + b"1\n0\n512\n"),
    "many members": lambda: an_archive(a_header(name="x") * 100_000),
    "many long names": lambda: an_archive(LONG_NAME * 20_000),
    "zeros": lambda: an_archive(packed_zeros=2**26),
    "a member of zeros": lambda: an_archive(a_header(2**26), packed_zeros=2**26),
    "a link to itself": lambda: an_archive(a_header(kind=tarfile.SYMTYPE)),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives(kind, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(ARCHIVES[kind]())
    assert (tmp_path / "a.tar.gz").stat().st_size < 2 * MILLION
    with memory(100), refused("a.tar.gz"):
        read_members(tmp_path / "a.tar.gz", {f"{FOLDER}/train"})


# torch files


def a_torch_file(
    path: Path, tensors: dict[str, torch.Tensor], pickled: bytes | None = None, packed: bool = False
) -> None:
    """A torch file with another pickle, or packed."""
    content = io.BytesIO()
    torch.save(tensors, content)
    with zipfile.ZipFile(content) as whole, zipfile.ZipFile(path, "w") as archive:
        for member in whole.infolist():
            inside = pickled if pickled is not None and member.filename.endswith(".pkl") else whole.read(member)
            archive.writestr(member.filename, inside, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)


def zeros(numbers: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(numbers, dtype=dtype)


REDUCED = b"\x80\x02(lcbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x01\x85R."
CODECS = (
    b"\x80\x02(lc_codecs\nencode\nq\x00" + text(b"a" * MILLION) + b"q\x01" + text(b"latin1") + b"q\x02"
    + b"h\x00h\x01h\x02\x86R" * 5000 + b"."
)  # fmt: skip
TORCH_FILES: dict[str, Callable[[Path], object]] = {
    "packed": lambda path: a_torch_file(path, {"cls_token": zeros(50 * MILLION)}, packed=True),
    "a bytearray": lambda path: a_torch_file(path, {}, REDUCED),
    "copies of a text": lambda path: a_torch_file(path, {}, CODECS),
    "lists": lambda path: a_torch_file(path, {}, b"\x80\x02" + b"]" * (5 * MILLION) + b"."),
    "an older file of a bytearray": lambda path: path.write_bytes(REDUCED),
    "an older file of lists": lambda path: path.write_bytes(b"\x80\x02" + b"]" * (5 * MILLION) + b"."),
    "one number for many": lambda path: torch.save({"cls_token": zeros(1).expand(1, 1, 10**12)}, path),
    "one tensor under many names": lambda path: torch.save(
        dict.fromkeys(map(str, range(300)), zeros(5 * MILLION)), path
    ),
    "a half under many names": lambda path: torch.save(
        dict.fromkeys(map(str, range(300)), zeros(5 * MILLION, torch.float16)), path
    ),
    "a large model of few numbers": lambda path: torch.save(
        {
            "cls_token": torch.zeros(1, 1, 1024),
            "pos_embed": torch.zeros(1, 5, 1024),
            "patch_embed.proj.weight": torch.zeros(1024, 3, 1, 1),
            **{f"blocks.{n}.x": torch.zeros(1) for n in range(24)},
        },
        path,
    ),
    "a patch of few numbers": lambda path: torch.save(
        {
            "cls_token": torch.zeros(1, 1, 96),
            "pos_embed": torch.zeros(1, 5, 96),
            "patch_embed.proj.weight": torch.zeros(1, 1, 1, 4096),
            **{f"blocks.{n}.x": torch.zeros(12 * 96**2) for n in range(6)},
        },
        path,
    ),
    "classes of few numbers": lambda path: torch.save(
        {
            "cls_token": torch.zeros(1, 1, 96),
            "pos_embed": torch.zeros(1, 5, 96),
            "patch_embed.proj.weight": torch.zeros(96, 3, 2, 2),
            "head.weight": torch.zeros(MILLION, 1),
            **{f"blocks.{n}.x": torch.zeros(12 * 96**2) for n in range(6)},
        },
        path,
    ),
}


@pytest.mark.parametrize("kind", TORCH_FILES)
def test_torch_files(kind, tmp_path):
    TORCH_FILES[kind](tmp_path / "w.pth")
    with memory(150), refused("w.pth", longest=500):
        load_weights(tmp_path / "w.pth", "micro")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_files_as_large_as_a_disk_that_hold_nothing(name, tmp_path, vit):
    with (tmp_path / name).open("wb") as file:
        file.write((100).to_bytes(8, "little") + b"{" if name == "w.safetensors" else b"PK\x03\x04")
        file.truncate(10**12)
    with memory(50), refused(name, "GB of memory"):
        load_weights(tmp_path / name, "micro")
    with memory(50), refused(name, "the limit"):
        read_mask_file(tmp_path / name)
    with memory(50), refused(name, "the limit"):
        read_head(tmp_path / name, vit)


@pytest.mark.parametrize("length", [50 * MILLION, 2**63])
def test_headers(length, tmp_path):
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little") + b'{"__metadata__": ')
        file.truncate(60 * MILLION)
    with memory(100), refused("w.safetensors"):
        load_weights(tmp_path / "w.safetensors", "micro")
    with memory(100), refused("w.safetensors"):
        read_mask_file(tmp_path / "w.safetensors")


# masks


def a_mask(folder: Path, model: VisionTransformer) -> bytes:
    mask = {"blocks.0.norm1.weight": torch.ones(96, dtype=torch.bool)}
    write_mask_file(folder / "m", mask, facts_of(mask, model))
    return (folder / "m").read_bytes()


def many_blocks(said: dict[str, Any], bits: dict[str, Any]) -> None:
    said["shapes"] = {f"blocks.{n}.mlp.fc1.weight": [384, 96] for n in range(2000)}
    bits.clear()
    bits.update({name: np.zeros(384 * 96 // 8, np.uint8) for name in said["shapes"]})


def of_a_library(said: dict[str, Any], bits: dict[str, Any]) -> None:
    said["facts"]["model"] = {"name": "timm:x", "image_size": 8, "num_classes": 1}
    said["shapes"] = {f"net.{n}.weight": [2**15, 2**15] for n in range(2)}
    bits.clear()
    bits.update({name: np.zeros(2**27, np.uint8)[:1] for name in said["shapes"]})


def many_names(said: dict[str, Any], bits: dict[str, Any]) -> None:
    said["shapes"] = {f"net.{n}.weight": [1] for n in range(100_000)}


def one_far_block(said: dict[str, Any], bits: dict[str, Any]) -> None:
    said["shapes"][f"blocks.{10**12}.norm1.weight"] = [96]
    bits[f"blocks.{10**12}.norm1.weight"] = np.zeros(12, np.uint8)


@pytest.mark.parametrize("change", [many_blocks, of_a_library, many_names, one_far_block])
def test_masks(change, vit, tmp_path):
    content = changed_mask(a_mask(tmp_path, vit), change)
    (tmp_path / "m").write_bytes(content)
    with memory(100), refused("m: not a readable fedtalos mask file"):
        mask, header = read_mask_file(tmp_path / "m")
        density_table(mask, header.eligible_in)


# checkpoints


def test_checkpoints(tmp_path, vit):
    tensors = {name: parameter.detach() for name, parameter in vit.named_parameters()}
    stated = {"model": vit.architecture.as_dict(), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for classes in (["x"] * 300_000, ["x" * MILLION] * 5, ["x"] * 65_000):
        path = save_checkpoint(tmp_path, "last", 1, tensors, {**stated, "classes": classes})
        with memory(100), refused("last.json"):
            checkpoint_weights(path)
    header = {"seal": UNSEALED, "format": 2, "file": "last-000001.safetensors", "sha256": "0"}
    path.write_bytes(sealed(json.dumps(header).encode()))
    with (tmp_path / "last-000001.safetensors").open("wb") as file:
        file.truncate(10**12)
    with memory(50), refused("last.json", "GB of memory"):
        load_checkpoint(path)
    path.write_bytes(b'{"format": 2, "seal": "", "x": [' + b"[]," * (5 * MILLION) + b"[]]}")
    with memory(600), refused("last.json"):
        load_checkpoint(path)


# images


def a_picture(mode: str, side: int, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (side, side)).save(content, kind, **options)
    return content.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "a bit a pixel": lambda: a_picture("1", 6000),
    "a palette": lambda: a_picture("P", 2100),
    "a clear palette": lambda: a_picture("P", 2100, transparency=0),
    "grey and clear": lambda: a_picture("LA", 2100),
    "16 bits": lambda: a_picture("I;16", 2100),
    "GIF": lambda: a_picture("L", 2100, "GIF"),
    "a header": lambda: resized_header(a_picture("RGB", 8), 15_000, 15_000),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_images(kind, tmp_path):
    """Eight small files of many pixels, decoded in several threads at once."""
    content = PICTURES[kind]()
    assert len(content) < 40_000
    for number in range(8):
        write(str(tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"), content)
    with memory(200), refused_if_at_all(longest=600):
        read_image_folder(tmp_path / "pictures", 8, cache_dir=tmp_path / "cache")


# tables, splits, options, grids


def rows(line: str, count: int) -> Iterator[str]:
    return (line.format(n) for n in range(count))


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "iterations": ("report.csv", lambda: "".join(rows("{},0,q,1,2\n", 9_000))),
    "lines of a report": ("report.csv", lambda: "1,0,q,1,2\n" * 20_000),
    "blocks": ("report.csv", lambda: "".join(rows("1,{},q,1,2\n", 50_000))),
    "columns": ("metrics.csv", lambda: "," * MILLION + "\n" + "1\n" * 1000),
    "cells": ("metrics.csv", lambda: "1" + ",val" * MILLION + "\n"),
    "a long cell": ("metrics.csv", lambda: "1," + "x" * (20 * MILLION) + "\n"),
    "lines": ("metrics.csv", lambda: "\n" * (3 * MILLION)),
    "splits": ("metrics.csv", lambda: "".join(rows("1,s{},1,1,1,1\n", 50_000))),
    "bytes": ("metrics.csv", lambda: "x" * 70 * MILLION),
    "a cell": ("metrics.csv", lambda: '"' + "x\n" * 30 * MILLION),
    "clients": ("client_accuracy.csv", lambda: "".join(rows("{},2,0.5\n", 20_000))),
    "lines of clients": ("client_accuracy.csv", lambda: "\n" * (3 * MILLION)),
    "rows of a run to go on with": ("open.csv", lambda: "1\n" * (3 * MILLION)),
    "cells of a run to go on with": ("open.csv", lambda: "1" + "," * MILLION + "\n"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "report.csv": read_report,
    "metrics.csv": read_history,
    "client_accuracy.csv": lambda folder: client_accuracies(SimpleNamespace(paths=RunPaths(folder.parents[1], "run"))),
    "open.csv": lambda folder: _whole_rows(folder / "open.csv", ["round", *COLUMNS]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(read_table, "__kwdefaults__", {**read_table.__kwdefaults__, "most_rows": 10_000})
    name, lines = TABLES[kind]
    columns = {
        "report.csv": "iteration,block,kind,active,entries",
        "client_accuracy.csv": "client,examples,accuracy",
        "open.csv": ",".join(["round", *COLUMNS]),
    }
    folder = tmp_path / "results/run"
    header = columns.get(name, "round,split,loss,accuracy,bytes_down,bytes_up")
    write(str(folder / name), f"{header}\n{lines()}")
    with memory(150 if kind == "a cell" else 400), refused(name):
        READERS[name](folder)


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(0, 1000000000000)", "(-1,)", "(3, 3)"])
@pytest.mark.parametrize("dtype", ["|u1", "<U0", "<U1000000000", "|V0"])
def test_splits(shape, dtype, tmp_path):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"abc"
    with zipfile.ZipFile(tmp_path / "split.npz", "w") as archive:
        for name in ("client", "label", "classes"):
            archive.writestr(f"{name}.npy", array)
    with memory(50), refused("split.npz"):
        read_split(tmp_path)


def a_split(path: Path, images: int, classes: list[str]) -> None:
    labels = np.arange(images, dtype=np.uint32) % len(classes)
    np.savez(path / "split.npz", client=labels % 200, label=labels, classes=np.array(classes))


def test_splits_of_many_classes_are_shown_in_part(tmp_path):
    a_split(tmp_path, 20_000, [f"{n:0100}" for n in range(20_000)])
    with memory(150):
        split = read_split(tmp_path)
        assert split is not None
        counts, which = counts_shown(split)
    assert counts.shape == (200, 1000)
    assert which == "200 clients, the first 1000 of 20,000 classes"
    assert [counts[n % 200, n] for n in (0, 7, 999)] == [1, 1, 1]


def test_splits_of_longer_names_or_more_images_than_there_are(tmp_path, monkeypatch):
    a_split(tmp_path, 10, ["x" * 300])
    with refused("split.npz"):
        read_split(tmp_path)
    monkeypatch.setattr(split_file, "MOST_IMAGES", 9)
    a_split(tmp_path, 10, ["x"])
    with refused("split.npz"):
        read_split(tmp_path)


def test_tensors_that_lie_where_a_checkpoint_is_to_be(tmp_path):
    with (tmp_path / "last-000001.safetensors").open("wb") as file:
        file.truncate(10**12)
    with memory(50):
        path = save_checkpoint(tmp_path, "last", 1, {"w": torch.ones(1)}, {})
    assert load_checkpoint(path).tensors["w"] == 1


def test_aliases_and_lengths_of_yaml(tmp_path):
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9))
    for content in (laughs, "x: " + "[" * 20_000, "x" * 200_000):
        (tmp_path / "c.yaml").write_text(content)
        with memory(150), refused("c.yaml"):
            read_yaml(tmp_path / "c.yaml")


def test_products_of_axes_are_counted_before_they_are_made(tmp_path):
    wide = {f"axis{n}": {str(value): {} for value in range(50)} for n in range(20)}
    for block in ({"axes": wide}, {"seeds": list(range(30_000))}, {"axes": {"a": wide["axis0"], "b": wide["axis1"]}}):
        grid = Grid(grid=[{"command": "federated", **block}])
        with memory(50), refused("grid 'g': expected 2000 runs at most"):
            expand("g", grid, {})


def test_references_have_no_widths():
    block = {"command": "federated", "options": {"mask": "run:{split:>3000000000}"}, "axes": {"split": {"iid": {}}}}
    with memory(50), refused("expected axes of its block in the braces", longest=400):
        expand("g", Grid(grid=[block]), {})


def test_a_model_of_its_size_is_still_read(tmp_path, vit):
    """The limits leave room for what they are to let in."""
    tensors = {name: parameter.detach() for name, parameter in vit.named_parameters()}
    torch.save(tensors, tmp_path / "w.pth")
    torch.save(tensors, tmp_path / "older.pth", _use_new_zipfile_serialization=False)
    for name in ("w.pth", "older.pth"):
        assert load_weights(tmp_path / name, "micro").architecture == vit.architecture
    assert yaml.safe_load("a: 1") == {"a": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted on Linux alone")
def test_what_libraries_unpack_is_bounded():
    with memory(64), pytest.raises(MemoryError), memory_up_to(2**26):
        np.zeros(2**28, np.uint8)
    assert len(np.zeros(2**28, np.uint8)) == 2**28
