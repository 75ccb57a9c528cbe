"""Whatever bytes come in, only InputError comes out, and quickly; a bit that flips in what we wrote is noticed."""

import csv
import gzip
import io
import json
import pickle
import tarfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import mask_header
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from material import changed_mask, picture
from safetensors.torch import save_file

from fedtalos.app.config.files import from_file, groups, override, read_yaml
from fedtalos.app.config.schema import RUN_CONFIGS
from fedtalos.app.figures.records import read_history
from fedtalos.app.run.recorder import COLUMNS, Recorder
from fedtalos.app.run.split_file import read_split
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.data.cifar import _unpickled
from fedtalos.data.downloads import read_members
from fedtalos.data.image_folder import read_image_folder
from fedtalos.errors import InputError
from fedtalos.files import UNSEALED, is_sealed, sealed
from fedtalos.models.heads import read_head, save_head
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.read import load_weights
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.describe import density_table
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.mask_file import read_mask_file, write_mask_file

SECONDS = 60  # of this process's own work, which other processes do not lengthen; far more than any of them takes

few = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@contextmanager
def only_input_errors():
    """Nothing else comes out, and not after endless work; the messages are one sentence."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's and zipfile's, of odd files
        try:
            yield
        except InputError as error:
            said = str(error)
        else:
            said = "nothing"
    assert 0 < len(said) < 1500
    assert time.process_time() - start < SECONDS


def damaged(content: bytes):
    """The same bytes but for a cut, some bits or a splice."""
    anywhere = st.integers(0, len(content) - 1)
    bits = st.lists(st.tuples(anywhere, st.integers(0, 7)), min_size=1, max_size=5)
    splices = st.tuples(anywhere, st.binary(max_size=12))
    return st.one_of(
        anywhere.map(lambda at: content[:at]),
        bits.map(lambda places: with_bits(content, places)),
        splices.map(lambda splice: content[: splice[0]] + splice[1] + content[splice[0] :]),
        splices.map(lambda splice: content[: splice[0]] + splice[1] + content[splice[0] + len(splice[1]) :]),
    )


def with_bits(content: bytes, places) -> bytes:
    changed = bytearray(content)
    for at, bit in places:
        changed[at] ^= 1 << bit
    return bytes(changed)


# seals: a flipped bit is noticed, wherever it is


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_what_is_sealed_is_so_and_nothing_else(before, after):
    content = sealed(before + UNSEALED.encode() + after)
    assert is_sealed(content)
    assert not is_sealed(before + UNSEALED.encode() + after)
    for at in range(len(content)):
        assert not is_sealed(with_bits(content, [(at, at % 8)]))


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    path = save_checkpoint(tmp_path, "last", 1, {"w": torch.randn(3)}, {"progress": {"done": 1, "best_accuracy": 0.5}})
    for file in (path, tmp_path / "last-000001.safetensors"):
        content = file.read_bytes()
        for at in range(len(content)):
            for bit in range(8):
                file.write_bytes(with_bits(content, [(at, bit)]))
                with pytest.raises(InputError):
                    load_checkpoint(path)
        file.write_bytes(content)
    assert load_checkpoint(path).facts["progress"] == {"done": 1, "best_accuracy": 0.5}


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    model = VisionTransformer(Architecture("micro", 8, 2, 5), torch_generator(0, "test"))
    rng = np.random.default_rng(0)
    mask = {name: t & torch.from_numpy(rng.random(t.shape) < 0.3) for name, t in eligible_entries(model).masks.items()}
    path = tmp_path_factory.mktemp("masked") / "m.safetensors"
    write_mask_file(path, mask, mask_header(mask, model.architecture.as_dict()))
    save_head(path.with_name("head.safetensors"), model)
    return path


@few
@given(data=st.data())
def test_any_bits_of_a_mask_or_head_count(masked, vit, tmp_path, data):
    for name, read in (("m", read_mask_file), ("head", lambda path: read_head(path, vit))):
        content = masked.with_name(f"{name}.safetensors").read_bytes()
        places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 7))
        chosen = data.draw(st.lists(places, min_size=1, max_size=4, unique=True))
        (tmp_path / "f").write_bytes(with_bits(content, chosen))
        with pytest.raises(InputError):
            read(tmp_path / "f")


# bytes of any kind


@pytest.mark.parametrize("kind", ["last.json", "m.safetensors", "weights.safetensors", "weights.pth"])
@few
@given(content=st.binary(max_size=300))
def test_any_bytes(kind, content, tmp_path, vit):
    path = tmp_path / kind
    path.write_bytes(content)
    readers = {
        "last.json": load_checkpoint,
        "m.safetensors": lambda path: (read_mask_file(path), read_head(path, vit)),
        "weights.safetensors": lambda path: load_weights(str(path), "micro"),
        "weights.pth": lambda path: load_weights(str(path), "micro"),
    }
    with pytest.raises(InputError):
        readers[kind](path)


@few
@given(text=st.one_of(plain.map(lambda value: yaml.safe_dump(value).encode()), st.binary(max_size=60)))
@example(text=b"!!timestamp x")
@example(text=b"!!float")
@example(text=b"? [a]\n: b")
@example(text=b"<<: 3")
def test_yaml(text, tmp_path):
    (tmp_path / "f.yaml").write_bytes(text)
    with only_input_errors():
        read_yaml(tmp_path / "f.yaml")


@pytest.mark.parametrize("command", RUN_CONFIGS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_options(command, data):
    known = sorted(groups(RUN_CONFIGS[command]))
    values = data.draw(st.dictionaries(st.sampled_from([*known, "odd"]), plain, min_size=1, max_size=3))
    with only_input_errors():
        override(RUN_CONFIGS[command](), values, "a file")


@few
@given(content=damaged((Path(__file__).parents[2] / "configs/default_config.yaml").read_bytes()))
def test_a_damaged_config_file(content, tmp_path):
    (tmp_path / "f.yaml").write_bytes(content)
    with only_input_errors():
        override(RUN_CONFIGS["federated"](), from_file(tmp_path / "f.yaml", "federated"), "f.yaml")


@few
@given(facts=st.dictionaries(st.sampled_from(["facts", "shapes", "eligible", "active", "model", "data"]), plain))
def test_masks_of_other_facts_sealed_anew(masked, facts, tmp_path):
    def change(header, _):
        header["facts"].update({key: value for key, value in facts.items() if key in header["facts"]})
        header.update({key: value for key, value in facts.items() if key in header})

    try:
        content = changed_mask(masked.read_bytes(), change)
    except TypeError:  # bytes and dates, which JSON has not
        return
    (tmp_path / "m").write_bytes(content)
    with only_input_errors():
        mask, header = read_mask_file(tmp_path / "m")
        density_table(mask, header.eligible_in)


@few
@given(shape=st.lists(st.integers(-(2**40), 2**70) | st.floats() | st.text(max_size=2), max_size=3), name=st.text())
@example(shape=[2, 5], name="blocks.0.attn.qkv.weight")
@example(shape=[10**12], name="blocks.0.norm1.weight")
@example(shape=[2**63, ""], name="blocks.0.norm1.weight")
def test_masks_of_other_shapes_sealed_anew(masked, shape, name, tmp_path):
    def change(header, bits):
        header["shapes"] = {name: shape}
        bits[name] = np.zeros(2, np.uint8)

    (tmp_path / "m").write_bytes(changed_mask(masked.read_bytes(), change))
    with only_input_errors():
        mask, header = read_mask_file(tmp_path / "m")
        density_table(mask, header.eligible_in)


# tables and splits


HEADER = ",".join(["round", *COLUMNS])
cells = st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=6), st.sampled_from(["", "val", "²"]))
tables = st.lists(st.lists(cells, min_size=8, max_size=10), max_size=4)


def table(rows) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return f"{HEADER}\n{text.getvalue()}".encode(errors="surrogateescape")


@few
@given(content=st.one_of(tables.map(table), st.binary(max_size=100), damaged(table([["1", "val", *"0123456"]] * 3))))
@example(content=f"{HEADER}\n²,val,1,1,1,1,1,1,1\n".encode())
@example(content=f"{HEADER}\n{'9' * 5000},val,1,1,1,1,1,1,1\n".encode())
def test_metrics(content, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    with only_input_errors():
        read_history(tmp_path)
    with only_input_errors():
        Recorder(tmp_path, "round", keep_to={"train": 3})


def a_split() -> bytes:
    content = io.BytesIO()
    np.savez(content, client=np.arange(6, dtype="u1") % 3, label=np.arange(6, dtype="u1") % 2, classes=["a", "b"])
    return content.getvalue()


@few
@given(content=st.one_of(damaged(a_split()), st.binary(max_size=100)))
def test_splits(content, tmp_path):
    """Refused, or what was written: zip has checksums of its own, but for its file times."""
    (tmp_path / "split.npz").write_bytes(content)
    with only_input_errors():
        split = read_split(tmp_path)
        assert split is not None
        assert (split.client.tolist(), split.classes) == ([0, 1, 2, 0, 1, 2], ("a", "b"))


# data


BATCH = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1], "names": ["é", b"x"]}, 2)
OPCODES = st.sampled_from(
    [bytes([code]) for code in b"()0123BCDFGIJKLMNPQRSTUVXabcdeghijlopqrstu.\x80\x81\x85\x8a\x93]})"]
)


@few
@given(content=st.one_of(damaged(BATCH), st.lists(OPCODES | st.binary(max_size=5), max_size=12).map(b"".join)))
@example(content=b"\x80\x02]r\xff\xff\xff\xff.")
@example(content=b"\x80\x02cnumpy\nndarray\n(\x8a\x05\xff\xff\xff\xff\x7f\x85tR.")
@example(content=b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.")
@example(content=b"\x80\x02" + b"(" * 100_000)
@example(content=b"\x80\x02" + b"]" + b"\x85" * 100_000 + b".")
def test_cifar_pickles(content):
    with only_input_errors():
        for key, value in _unpickled(content, "train").items():
            assert isinstance(key, str)
            assert getattr(value, "__module__", "") in ("", "fedtalos.data.cifar", "numpy")


@few
@given(data=st.data())
def test_archives(tmp_path, data):
    plain_tar = io.BytesIO()
    with tarfile.open(fileobj=plain_tar, mode="w") as tar:
        member = tarfile.TarInfo("folder/file")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"good"))
    packed = gzip.compress(plain_tar.getvalue())
    repacked = damaged(plain_tar.getvalue()).map(gzip.compress)
    (tmp_path / "a.tar.gz").write_bytes(data.draw(st.one_of(damaged(packed), repacked, st.binary(max_size=60))))
    with only_input_errors():
        assert set(read_members(tmp_path / "a.tar.gz", {"folder/file"})) == {"folder/file"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_images(kind, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in ("class", "another"):
        (folder / name).mkdir()
        (folder / name / f"a.{kind.lower()}").write_bytes(picture(kind))
    (folder / "class" / f"b.{kind.lower()}").write_bytes(data.draw(damaged(picture(kind)) | st.binary(max_size=60)))
    with only_input_errors():
        read_image_folder(folder, 8)


NAMES = st.sampled_from(
    [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "head.weight",
        "reg_token",
        "embeddings.cls_token",
        "vit.embeddings.cls_token",
        "classifier.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.x",
        "blocks",
        "encoder.layer.0.attention.attention.query.weight",
        "encoder.layer.0.attention.attention.key.weight",
        "encoder.layer.0.attention.attention.value.weight",
        "embeddings.position_embeddings",
        "norm.bias",
    ]
)
SHAPES = st.lists(st.integers(0, 3) | st.just(96), max_size=4).map(tuple)


@few
@given(shapes=st.dictionaries(NAMES, SHAPES, max_size=8), suffix=st.sampled_from([".safetensors", ".pth"]))
@example(shapes={"embeddings.cls_token": (), "classifier.weight": ()}, suffix=".safetensors")
@example(shapes={"blocks.0.mlp.fc1.weight": (), "blocks.0.mlp.fc2.weight": ()}, suffix=".safetensors")
def test_weights_of_any_names_and_shapes(shapes, suffix, tmp_path):
    state, path = {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with only_input_errors():
        load_weights(str(path), "micro")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@few
@given(data=st.data())
def test_damaged_weights(suffix, data, tmp_path):
    path = tmp_path / f"w{suffix}"
    state = {"cls_token": torch.ones(1, 1, 96), "pos_embed": torch.ones(1, 5, 96)}
    save_file(state, path, {"pixels": json.dumps({"mean": [0.5] * 3})})
    if suffix == ".pth":
        torch.save(state, path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with only_input_errors():
        load_weights(str(path), "micro")
