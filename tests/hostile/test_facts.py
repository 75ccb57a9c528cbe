"""Facts in files: whatever a file states in place of any of them, it is refused in a sentence, or within the bounds."""

import csv
import io
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import mask_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import refused, refused_if_at_all
from material import changed_mask

from fedtalos.app.figures.records import read_history, read_report
from fedtalos.app.run import runs
from fedtalos.app.run.books import Edited
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.runs import read_run
from fedtalos.app.run.session import Progress, Saved
from fedtalos.app.run.split_file import read_split
from fedtalos.app.run.trackers import wandb_id
from fedtalos.app.run.trained_apart import Merged
from fedtalos.app.run.units import duration, percent
from fedtalos.app.run.watched import progress_in_words
from fedtalos.app.sweep.tables import _Record, _Summary
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.data import folder_cache
from fedtalos.errors import InputError
from fedtalos.facts import Count, Number, Word, facts_from, read_facts, read_file, read_table, table_schema
from fedtalos.fleet.place import _About
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.checkpoints import ModelFacts, checkpoint_weights
from fedtalos.models.weights.pixels import stated
from fedtalos.randomness import torch_generator
from fedtalos.tensor_file import metadata_of
from fedtalos.training.editing.mask_facts import MaskFacts
from fedtalos.training.editing.mask_file import read_mask_file, write_mask_file
from fedtalos.training.editing.vector_facts import VectorFacts
from fedtalos.training.entries import Entries
from fedtalos.training.optimizer_state import optimizer_tensors, restore_optimizer
from fedtalos.training.sparse_optimizer import make_optimizer

many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

HOSTILE = [
    None, True, -1, 10**9, 10**30, 10**400, 1e300, 0.5, "", "0.5", "\x1b[2J", "x" * 100_000, "\udce9", [], [[]], {},
    [0.5, 0.5], [1] * 70_000, {"a": {"b": {"c": 1}}}, {"\x1b": 1}, [None, None, None],
]  # fmt: skip
"""Values of other kinds, sizes and depths than any fact has."""

json_values = st.recursive(
    st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Every place in nested dictionaries and lists, the whole first."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, inner in inside for place in places(inner, (*at, key)))]


def with_value(whole: Any, at: tuple[Any, ...], value: object) -> Any:
    """A copy with another value at a place."""
    if not at:
        return value
    copy = dict(whole) if isinstance(whole, dict) else list(whole)
    copy[at[0]] = with_value(copy[at[0]], at[1:], value)
    return copy


def mask_facts() -> dict[str, Any]:
    return json.loads(json.dumps(asdict(mask_header({}, {"size": "micro", "patch_size": 4}))))


DONE = {"iteration": 1, "active": 3, "density": 0.5, "bytes_down": 1, "bytes_up": 1, "seconds": 0.5}
SCHEMAS: dict[type, dict[str, Any]] = {
    ModelFacts: {
        "model": {"size": "micro", "image_size": 8, "patch_size": 2, "num_classes": 2, "registers": 1},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "classes": ["a", "b"],
        "crop": 0.9,
    },
    Saved: {"progress": asdict(Progress(left_out={"bad update": 1})), "options": {"seed": 0}},
    Edited: {"rows": [DONE], "report": [{"iteration": 1, "block": 0, "kind": "q", "active": 1, "entries": 2}]},
    MaskFacts: mask_facts(),
    runs._Record: {
        "command": "federated",
        "num_rounds": 3,
        "tasks": 2,
        "leave_out": [1],
        "dataset": "folder",
        "data_dir": "photos",
        "made_by": {"folder": "/data", "inputs": {"data": "abc"}, "decided": {"precision": "fp32"}},
    },
    Merged: {"alpha": 0.5, "refit": "ridge", "units": ["task0", "task1"]},
    folder_cache.Facts: {"classes": ["a", "b"], "splits": ["train"], "said": {"left out": "one file"}},
    VectorFacts: {"weights": "none", "model": {"size": "micro"}, "parameters": 9, "task": ["a"], "made_from": ["x"]},
    _Summary: {"seconds": 1.5, "test_accuracy": {"last": 0.5, "best_on_val": None}, "megabytes_sent": {"up": 1.5}},
    _Record: {"made_by": {"commit": "abc"}},
    _About: {"host": "192.168.1.20", "port": 8000, "clients": 3, "tls": True},
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_each_fact_in_turn_is_something_else(kind):
    """A generator: every fact of every schema, by every hostile value."""
    good = SCHEMAS[kind]
    facts_from(kind, good, "a file is broken")
    for at in places(good):
        for value in HOSTILE:
            with refused_if_at_all():
                read = facts_from(kind, with_value(good, at, value), "checkpoint my_run/last.json: broken")
                assert np.isfinite([n for n in numbers(asdict(read)) if not isinstance(n, bool)]).all()
                assert max((abs(n) for n in numbers(asdict(read))), default=0) <= 2**62


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for key, inner in value.items() if key != "options" for n in numbers(inner)]
    if isinstance(value, list | tuple):
        return [n for inner in value for n in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


@many
@given(value=json_values, kind=st.sampled_from(list(SCHEMAS)), data=st.data())
def test_any_json_in_any_place(value, kind, data):
    good = SCHEMAS[kind]
    changed = with_value(good, data.draw(st.sampled_from(places(good))), value)
    with refused_if_at_all():
        facts_from(kind, changed, "a file is broken")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{" * 10, '{"a":' * 5000, "9" * 5000, '"\\ud800"', "NaN", "\0", "", "null", b"\xff\xfe", "1e999"],
)
def test_json_that_is_none(text):
    for kind in SCHEMAS:
        with refused("my_run/last.json"):
            read_facts(kind, text, f"checkpoint {'/a/long/path' * 30}/my_run/last.json: broken")


# files that are none


def odd_files(folder: Path) -> dict[str, Path]:
    """A pipe, a device, a folder, a link to nothing, a file that is as large as a disk and holds nothing."""
    made = {name: folder / name for name in ("pipe", "folder", "nothing", "sparse", "itself")}
    os.mkfifo(made["pipe"])
    made["folder"].mkdir()
    made["nothing"].symlink_to("nowhere")
    made["itself"].symlink_to("itself")
    with made["sparse"].open("wb") as file:
        file.truncate(10**12)
    return made | {"device": Path("/dev/zero")}


@pytest.mark.parametrize("name", ["pipe", "folder", "nothing", "sparse", "itself", "device"])
def test_what_is_no_plain_file_of_its_size_is_not_read(name, tmp_path, vit):
    path = odd_files(tmp_path)[name]
    with refused(name):
        read_file(path, f"file {path}", most=2**20)
    run = tmp_path / "run"
    run.mkdir()
    for file, read in (("report.csv", read_report), ("metrics.csv", read_history), ("split.npz", read_split)):
        (run / file).symlink_to(path)
        with refused_if_at_all():
            read(run)
    (run / "last.json").symlink_to(path)
    with refused("last.json"):
        load_checkpoint(run / "last.json")
    saved = save_checkpoint(tmp_path / "saved", "last", 1, {"w": torch.zeros(3)}, {})
    (tmp_path / "saved/last-000001.safetensors").unlink()
    (tmp_path / "saved/last-000001.safetensors").symlink_to(path)
    with refused("last.json"):
        load_checkpoint(saved)


@pytest.mark.parametrize("content", [b"", b"\x1b[2J", b"\xff", b"x" * 101, b"../x", b"a b"])
def test_ids_of_trackers(content, tmp_path):
    (tmp_path / ".wandb_id").write_bytes(content)
    with refused(".wandb_id", "remove it"):
        wandb_id(tmp_path)


# checkpoints, sealed anew by someone who means it


@pytest.fixture
def checkpoint(tmp_path, vit) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    stated = {"model": vit.architecture.as_dict(), "mean": (0.5,) * 3, "std": (0.5,) * 3, "classes": list("abcde")}
    tensors = {name: parameter.detach() for name, parameter in vit.named_parameters()}
    path = save_checkpoint(tmp_path, "last", 1, tensors, stated)
    assert checkpoint_weights(path).architecture == vit.architecture
    return path, tensors, stated


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"registers": 10**9}, "registers"),
        ({"registers": 1}, "its tensors are not those of the ViT"),
        ({"size": "large"}, "its tensors are not those of the ViT"),
        ({"size": "enormous"}, "expected one of micro"),
        ({"image_size": 4096}, "its tensors are not those of the ViT"),
        ({"patch_size": "2"}, "patch_size: input should be a valid integer, got '2'"),
        ({"num_classes": 65_000}, "its tensors are not those of the ViT"),
        ({"layer_scale": True}, "its tensors are not those of the ViT"),
        ({"tomorrow": 1}, "tomorrow"),
    ],
)
def test_a_checkpoint_of_another_model_than_it_says(facts, words, checkpoint, tmp_path):
    _, tensors, stated = checkpoint
    path = save_checkpoint(tmp_path, "last", 1, tensors, {**stated, "model": {**stated["model"], **facts}})
    with refused("checkpoint ", "last.json", words):
        checkpoint_weights(path)


def test_no_library_is_asked_for_a_model_of_a_place(checkpoint, tmp_path):
    _, tensors, stated = checkpoint
    for name in ("timm:hf-hub:owner/repo", "timm:local-dir:/tmp", "torch:../x", "timm:"):
        about = {"name": name, "image_size": 8, "num_classes": 5}
        path = save_checkpoint(tmp_path, "last", 1, tensors, {**stated, "model": about})
        with refused("model.LibraryArchitecture.name"):
            checkpoint_weights(path)


def test_every_tensor_of_a_model_in_turn_has_another_shape(checkpoint, tmp_path, vit):
    _, tensors, stated = checkpoint
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight", "blocks.0.attn.qkv.weight"):
        for shape in ((), (0,), (1, 1, 1, 4096), (65_000, 1), (1, 1, 1024), (3, 3)):
            path = save_checkpoint(tmp_path, "last", 1, {**tensors, name: torch.zeros(shape)}, stated)
            with refused_if_at_all(longest=600):
                weights = checkpoint_weights(path)
                assert name == "blocks.0.attn.qkv.weight"  # the model's own loader refuses that
                assert weights.architecture == vit.architecture


# an optimiser's state


def optimizer_of(rule: str, *, sparse: bool) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    mask = torch.arange(12).reshape(3, 4) < 5 if sparse else torch.ones(3, 4, dtype=torch.bool)
    optimizer = make_optimizer({"w": parameter}, Entries({"w": mask}), rule=rule, learning_rate=0.1)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_only_the_state_of_this_optimiser_is_put_back(rule, sparse):
    """A generator: every tensor of the state gone, of another shape, type, name, or without a number."""
    optimizer = optimizer_of(rule, sparse=sparse)
    good = optimizer_tensors(optimizer)
    restore_optimizer(optimizer, good)
    assert optimizer_tensors(optimizer).keys() == good.keys()
    others = [
        (f"optimizer/{name}", torch.ones(())) for name in ("0/other", "9/step", "x/step", "0", "-1/step", "0/a/b")
    ]
    for name, tensor in good.items():
        flat = tensor.flatten()
        others += [(name, t) for t in (tensor.long(), tensor[None], flat[:-1], flat.repeat(3), tensor * torch.nan)]
        if name.endswith(("step", "exp_avg_sq")):
            others.append((name, -tensor - 1))
        if rule == "adamw":
            with refused("the checkpoint's", "start a run of another name"):
                restore_optimizer(optimizer, {key: value for key, value in good.items() if key != name})
    for name, tensor in others:
        with refused("the checkpoint's 'optimizer/", "start a run of another name"):
            restore_optimizer(optimizer, {**good, name: tensor})
    optimizer.step()


# masks


def a_mask(folder: Path) -> Path:
    model = VisionTransformer(Architecture("micro", 8, 2, 5), torch_generator(0, "test"))
    mask = {"blocks.0.norm1.weight": torch.arange(96) < 9, "blocks.0.attn.qkv.bias": torch.arange(288) < 9}
    every = sum(96 * (12 * 96 + 13) for _ in range(6)) - 6 * 96  # all weights and biases, without the keys' biases
    header = replace(mask_header(mask, model.architecture.as_dict()), eligible=every)
    write_mask_file(folder / "m.safetensors", mask, header)
    return folder / "m.safetensors"


def test_each_fact_of_a_mask_in_turn_is_something_else(tmp_path):
    content = a_mask(tmp_path).read_bytes()
    assert read_mask_file(tmp_path / "m.safetensors")[1].active == 18
    header = json.loads(metadata_of(content, "fedtalos_mask", "m.safetensors"))
    for number, at in enumerate(places(header)[1:]):
        for value in HOSTILE[number % 4 :: 4]:  # all of them would take seconds

            def change(said: dict[str, Any], _: object, at: Any = at, value: object = value) -> None:
                said.update(with_value(said, at, value))

            (tmp_path / "other.safetensors").write_bytes(changed_mask(content, change))
            with refused_if_at_all():
                _, read = read_mask_file(tmp_path / "other.safetensors")
                assert (read.active, read.eligible) == (18, 670464)


@pytest.mark.parametrize("eligible", [0, 17, 18, 670463, 670465, 10**15])
def test_a_false_number_of_eligible_entries_is_not_shown(eligible, tmp_path):
    content = a_mask(tmp_path).read_bytes()
    changed = changed_mask(content, lambda said, _: said["facts"].update(eligible=eligible))
    (tmp_path / "m.safetensors").write_bytes(changed)
    with refused("m.safetensors: not a readable fedtalos mask file"):
        read_mask_file(tmp_path / "m.safetensors")


# statistics beside weights


@many
@given(
    mean=json_values,
    std=json_values,
    more=st.dictionaries(st.sampled_from(["crop_pct", "size", "crop_size"]), json_values),
)
def test_statistics(mean, std, more):
    for keys in (("mean", "std"), ("image_mean", "image_std")):
        with refused_if_at_all():
            found = stated("vit.json", {**dict(zip(keys, (mean, std), strict=True)), **more, "do_center_crop": True})
            assert found is not None
            assert np.isfinite([*found.mean, *found.std, found.crop]).all()
            assert 0.25 <= found.crop <= 1  # images are stored at 1 / crop times their side


def test_a_crop_that_would_store_images_at_many_times_their_size():
    with refused("crop: input should be greater than or equal to 0.25"):
        facts_from(ModelFacts, {**SCHEMAS[ModelFacts], "crop": 1e-9}, "a file is broken")


# tables and splits


@table_schema
@dataclass(frozen=True)
class Line:
    round: Count
    split: Word
    loss: Number | None = None


CELLS = ["", "1", "-1", "nan", "inf", "1e300", "9" * 5000, "²", "\x1b[2J", "x" * 90_000, "\udce9", '"', "a\nb", "=1+1"]


@many
@given(rows=st.lists(st.lists(st.sampled_from(CELLS), max_size=12), max_size=6), data=st.data())
def test_tables(rows, data, tmp_path):
    header = data.draw(st.sampled_from([["round", "split"], ["round", "split", "loss", "x"], ["split"], [], CELLS[:9]]))
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    (tmp_path / "t.csv").write_bytes(text.getvalue().encode(errors="surrogateescape"))
    with refused_if_at_all():
        _, read = read_table(Line, tmp_path / "t.csv", most_bytes=2**20, most_rows=3)
        assert len(read) <= 3
        assert all(0 <= line.round < 2**63 and line.split.isprintable() for line in read)


COLUMNS = "round,split,loss,accuracy,bytes_down,bytes_up\n"


@pytest.mark.parametrize("cell", CELLS)
def test_each_cell_of_the_metrics_and_the_report_in_turn(cell, tmp_path):
    line, report = ["1", "val", "0.5", "0.5", "1", "1"], ["1", "0", "q", "1", "2"]
    for place in range(6):
        cells = [cell if at == place else good for at, good in enumerate(line)]
        row = io.StringIO()
        csv.writer(row).writerow(cells)
        content = f"{COLUMNS}{row.getvalue()}1,val,1,0.5,1,1\n"
        (tmp_path / "metrics.csv").write_bytes(content.encode(errors="surrogateescape"))
        with refused_if_at_all():
            read_history(tmp_path)
        row = io.StringIO()
        csv.writer(row).writerow([cell if at == place else good for at, good in enumerate(report)])
        content = f"iteration,block,kind,active,entries\n{row.getvalue()}"
        (tmp_path / "report.csv").write_bytes(content.encode(errors="surrogateescape"))
        with refused_if_at_all():
            read_report(tmp_path)


def shows_itself(paths: RunPaths) -> None:
    """A run says how it stands, in print, whatever lies in its folders."""
    run = read_run(paths)
    assert run.state in ("finished", "stopped", "broken")
    words = [run.command, progress_in_words(run), duration(run.seconds), percent(run.best), percent(run.test)]
    assert all(text.isprintable() for text in words)
    assert sum(map(len, words)) < 2000


@pytest.mark.parametrize("cell", CELLS)
def test_a_run_with_any_cell_in_its_metrics_says_how_it_stands(cell, tmp_path):
    paths = RunPaths(tmp_path, "r")
    paths.results.mkdir(parents=True)
    paths.config.write_text("command: federated\nnum_rounds: 3\n")
    good = {"round": "1", "split": "train", "loss": "1", "accuracy": "0.5", "examples": "3", "seconds": "1"}
    good |= {"bytes_down": "1", "bytes_up": "1"}
    for name in good:
        text = io.StringIO()
        csv.writer(text).writerows([good, good.values(), ({**good, name: cell}).values()])
        (paths.results / "metrics.csv").write_bytes(text.getvalue().encode(errors="surrogateescape"))
        shows_itself(paths)


def test_an_edit_with_any_fact_in_its_checkpoint_says_how_it_stands(tmp_path):
    paths = RunPaths(tmp_path, "r")
    for folder in (paths.results, paths.checkpoints):
        folder.mkdir(parents=True)
    paths.config.write_text("command: editing\nnum_iterations: 3\n")
    for at in places(SCHEMAS[Edited]):
        for value in HOSTILE:
            said = with_value(SCHEMAS[Edited], at, value)
            (paths.checkpoints / "last.json").write_text(json.dumps(said, ensure_ascii=True))
            shows_itself(paths)


ARRAYS = {
    "client": [
        np.zeros(4, "u8") + np.uint64(2**64 - 1), np.zeros(4, "u8"), np.zeros(4, "i8") - 1, np.zeros(4, "f4"),
        np.zeros((2, 2), "u1"), np.zeros(0, "u1"), np.array([0, 1, 2, 4], "u1"), np.zeros(4, "<U0"), np.zeros((), "u1"),
    ],
    "label": [
        np.zeros(4, "u8") + np.uint64(2**64 - 1), np.array([0, 1, 2, 255], "u1"), np.zeros(3, "u1"), np.zeros(4, "V0"),
    ],
    "classes": [
        np.array([], "<U1"), np.array([b"a", b"b"]), np.array(["x" * 2000] * 3), np.zeros((2, 2), "<U1"),
        np.zeros(70_000, "<U1"), np.zeros(3, "u1"), np.array(["\x1b[2J", "a\nb", "\udce9"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_splits_of_other_arrays(name, tmp_path):
    good = {
        "client": np.array([0, 1, 1, 0], "u1"),
        "label": np.array([0, 1, 2, 0], "u1"),
        "classes": np.array([*"abc"]),
    }
    for array in ARRAYS[name]:
        np.savez(tmp_path / "split.npz", **{**good, name: array})
        with refused_if_at_all():
            split = read_split(tmp_path)
            assert split is not None
            assert split.client.max() < 4
            assert split.label.max() < len(split.classes)
    (tmp_path / "split.npz").write_bytes(b"")
    with refused("split.npz"):
        read_split(tmp_path)


# YAML records


@many
@given(value=json_values)
def test_records_in_yaml(value, tmp_path):
    from fedtalos.app.config.files import read_yaml
    from fedtalos.app.run.resume import folder_of_record

    path = tmp_path / "config.yaml"
    try:
        path.write_text(yaml.safe_dump({"made_by": {"folder": value, "inputs": value}, "partition": value}))
    except (ValueError, UnicodeEncodeError):  # what YAML cannot say
        return
    with refused_if_at_all():
        folder_of_record(path)
    with refused_if_at_all():
        facts_from(_Record, read_yaml(path), str(path))


def test_input_errors_are_one_line_of_print():
    assert str(InputError("a\x1b[31m\nb\udce9")) == r"a\x1b[31m b\udce9"
