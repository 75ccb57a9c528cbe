"""Tensors in files: whatever a header or a tensor is in place of what was written, it is refused in a sentence."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import memory, refused, refused_if_at_all
from material import safetensors_of
from safetensors.torch import save as save_tensors
from test_facts import HOSTILE, a_mask, odd_files, places, with_value

from fedtalos.app.run.apart import APART, shapes_of_start
from fedtalos.app.run.books import Books
from fedtalos.app.run.kept import Kept
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.start import Start
from fedtalos.checkpoint import load_checkpoint, save_checkpoint, tensors_under
from fedtalos.data.folder_cache import Entry, Facts
from fedtalos.files import UNSEALED, is_sealed, sealed
from fedtalos.models.heads import HeadSums, best_head, read_head, save_head
from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.editing.vector_facts import facts_of
from fedtalos.training.editing.vector_file import load_vector, save_vector
from fedtalos.training.entries import Entries
from fedtalos.training.masked_parameters import MaskedParameters

many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

SHAPES = [[2**62, 0], [2**40, 0, 2**40], [1] * 200, [0], [], [-1], [2**63, 0], [1, 1, 1]]
"""Such as take no room in a file, and no tensor has."""
TYPES = ["F4", "F8_E8M0", "F8_E5M2", "C64", "U64", "BOOL", "I64", "F64", "Z9", "bool"]


def a_head(folder: Path, model: VisionTransformer) -> Path:
    save_head(folder / "h.safetensors", model)
    return folder / "h.safetensors"


def a_vector(folder: Path, model: VisionTransformer) -> Path:
    mask = {"blocks.0.norm1.weight": torch.arange(96) < 9}
    head = (model.head.weight.detach(), model.head.bias.detach())
    save_vector(folder / "v.safetensors", TaskVector(mask, torch.ones(9), facts_of(model, head), head))
    return folder / "v.safetensors"


def some_sums(folder: Path, model: VisionTransformer) -> Path:
    kept = Kept(RunPaths(folder, "r"))
    kept.write_sums("task0", HeadSums(torch.ones(97, 5).double(), torch.ones(97, 97).double()))
    return kept.sums("task0")


def an_entry(folder: Path, _: VisionTransformer) -> Path:
    entry = Entry(folder, "photos", "1f0c")
    tensors = {"train_pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "train_labels": torch.arange(2)}
    assert entry.save(tensors, Facts(("a", "b"), ("train",), {"left out": "caf\udce9"})) is None
    return entry.path


def a_checkpoint(folder: Path, _: VisionTransformer) -> Path:
    saved = save_checkpoint(folder, "last", 1, {"w": torch.ones(3), "optimizer/0/step": torch.ones(())}, {})
    return saved.with_name("last-000001.safetensors")


def read_the_checkpoint(path: Path, _: VisionTransformer) -> object:
    """Read what a stranger sealed anew."""
    header = path.with_name("last.json")
    said = json.loads(header.read_bytes()) | {"seal": UNSEALED}
    if path.is_file() and path.stat().st_size < 2**20:
        said["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    header.write_bytes(sealed(json.dumps(said).encode()))
    return load_checkpoint(header)


Read = Callable[[Path, VisionTransformer], object]
FILES: dict[str, tuple[Callable[[Path, VisionTransformer], Path], Read]] = {
    "head": (a_head, read_head),
    "mask": (lambda folder, _: a_mask(folder), lambda path, _: read_mask_file(path)),
    "vector": (a_vector, lambda path, _: load_vector(path)),
    "sums": (some_sums, lambda path, vit: Kept(RunPaths(path.parents[2], "r")).read_sums("task0", "ridge", vit)),
    "entry": (an_entry, lambda path, _: Entry(path.parent, "photos", "1f0c").load()),
    "checkpoint": (a_checkpoint, read_the_checkpoint),
}
"""A file of each kind, and its reader."""


def with_header(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """The file of another header, sealed anew where it was sealed."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if is_sealed(content):
        text = header.decode()
        at = text.index("sha256:")
        header = (text[:at] + UNSEALED + text[at + len(UNSEALED) :]).encode()
    return sealed(safetensors_of(json.dumps(change(json.loads(header))).encode(), data))


@pytest.mark.parametrize("kind", FILES)
def test_each_fact_of_a_header_in_turn_is_something_else(kind, tmp_path, vit):
    """A generator: every type, shape and place of every tensor, and all that is above them."""
    make, read = FILES[kind]
    path = make(tmp_path, vit)
    content = path.read_bytes()
    assert read(path, vit) is not None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for number, at in enumerate(places(header)):
        odd = {"shape": SHAPES, "dtype": TYPES}.get(str(at[-1]) if at else "", [])
        for value in odd + HOSTILE[number % 4 :: 4]:
            path.write_bytes(with_header(content, lambda whole, at=at, value=value: with_value(whole, at, value)))
            with memory(200), refused_if_at_all():
                read(path, vit)


@pytest.mark.parametrize("kind", FILES)
def test_only_plain_whole_files_are_read(kind, tmp_path, vit):
    make, read = FILES[kind]
    path = make(tmp_path, vit)
    content = path.read_bytes()
    for broken in (b"", content[:7], content[:8], content[:60], content[:-1], bytes(8) + content[8:], b"\xff" * 100):
        path.write_bytes(broken)
        with refused_if_at_all():
            assert read(path, vit) is None
    (tmp_path / "odd").mkdir()
    for odd in odd_files(tmp_path / "odd").values():
        path.unlink()
        path.symlink_to(odd)
        with memory(50), refused_if_at_all():
            assert read(path, vit) is None


tensors = st.dictionaries(
    st.sampled_from(["head.weight", "head.bias", "xy", "xx", "values", "\x1b[2J", "x" * 5000]),
    st.tuples(
        st.sampled_from([(), (0,), (5,), (5, 96), (97, 5), (97, 97), (1, 1, 1, 5)]),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
        st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
    ),
    max_size=4,
)


@many
@given(given=tensors)
def test_heads_and_sums_of_any_tensors(given, tmp_path, vit):
    made = {
        name: torch.full(shape, value if kind.is_floating_point else 1.0, dtype=kind)
        for name, (shape, kind, value) in given.items()
    }
    content = sealed(save_tensors(made, {"seal": UNSEALED}))
    for name in ("head", "sums"):
        path = tmp_path / "h.safetensors" if name == "head" else Kept(RunPaths(tmp_path, "r")).sums("task0")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        with refused_if_at_all():
            found = FILES[name][1](path, vit)
            assert found is not None
            weight, bias = found if isinstance(found, tuple) else (found.xy, found.xx)
            assert (weight.shape, bias.shape) in (((5, 96), (5,)), ((97, 5), (97, 97)))
            assert bool(weight.isfinite().all() and bias.isfinite().all())


@pytest.mark.parametrize("kind", ["ridge", "ncm"])
def test_sums_that_fix_no_head_give_none(kind, vit):
    features, labels = torch.rand(4, 96), torch.arange(4)
    for value in (0.0, -1.0, 1e300):
        xy, xx = (torch.full((97, columns), value, dtype=torch.float64) for columns in (5, 97))
        sums = HeadSums(xy, xx)
        with refused_if_at_all():
            assert all(bool(tensor.isfinite().all()) for tensor in best_head(kind, sums, features, labels))


def test_a_vector_of_more_entries_than_any_model_has(tmp_path, vit):
    path = a_vector(tmp_path, vit)

    def change(whole: Any) -> Any:
        said = json.loads(whole["__metadata__"]["fedtalos_vector"])
        said["shapes"] = {f"w{number}": [2**30] for number in range(9)}
        return {**whole, "__metadata__": {"fedtalos_vector": json.dumps(said)}}

    path.write_bytes(with_header(path.read_bytes(), change))
    with memory(50), refused("v.safetensors", "more entries than any model here has"):
        load_vector(path)


# tensors of checkpoints that belong to a run


def others(good: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A generator: each tensor in turn missing, of another shape or type, or without a number; and one more."""
    found = [{**good, "more": torch.ones(3)}]
    for name, tensor in good.items():
        found.append({key: value for key, value in good.items() if key != name})
        changed = (tensor[None], tensor[:-1], tensor.flatten()[:0], tensor.long(), tensor * torch.nan)
        found += [{**good, name: each} for each in changed]
    return found


def test_only_the_start_of_this_run_is_put_back(vit):
    moving = MaskedParameters(vit)
    shapes = shapes_of_start(moving)
    good = {name: torch.ones(shape) for name, shape in shapes.items()}
    named = {f"{APART}{name}": tensor for name, tensor in good.items()}
    assert tensors_under({**named, "w": torch.ones(9)}, APART, shapes).keys() == good.keys()
    for changed in others(good):
        with refused("the checkpoint's 'apart/", "is not of this run; start a run of another name"):
            tensors_under({f"{APART}{name}": tensor for name, tensor in changed.items()}, APART, shapes)
    start = Start(moving, {})
    assert Start(moving, start.tensors()).tensors().keys() == start.tensors().keys()
    for changed in others({name.removeprefix("start/"): tensor for name, tensor in start.tensors().items()}):
        with refused("the checkpoint's 'start/", "is not of this run"):
            Start(moving, {f"start/{name}": tensor for name, tensor in changed.items()})


def test_only_the_vector_of_what_moves_in_this_run_is_read(tmp_path, vit):
    moving, kept = MaskedParameters(vit), Kept(RunPaths(tmp_path, "r"))
    head = (vit.head.weight.detach(), vit.head.bias.detach())
    facts = facts_of(vit, head)
    whole = TaskVector(moving.entries.masks, torch.ones(len(moving)), facts, head)
    save_vector(kept.vector("task0"), whole)
    assert len(kept.read("task0", moving)) == len(moving)
    turned = {name: mask.flatten().roll(1).view(mask.shape) for name, mask in some(vit).items()}
    for other in (
        TaskVector(some(vit), torch.ones(9), facts, head),
        TaskVector(turned, torch.ones(9), facts, head),
        replace(whole, head=None),
    ):
        save_vector(kept.vector("task0"), other)
        with refused("task0.safetensors: of another mask or model than its run"):
            kept.read("task0", moving)
    save_vector(kept.vector("task0"), TaskVector(turned, torch.ones(9), facts, head))
    with refused("of another mask or model than its run"):
        kept.read("task0", MaskedParameters(vit, some(vit)))


def some(vit: VisionTransformer) -> dict[str, torch.Tensor]:
    return {"blocks.0.norm1.weight": torch.arange(96) < 9}


def test_an_edit_whose_checkpoint_contradicts_itself_does_not_go_on(tmp_path):
    paths = RunPaths(tmp_path, "r")
    eligible = Entries({"w": torch.ones(9, dtype=torch.bool)})
    row = {"iteration": 1, "active": 3, "density": 0.3, "bytes_down": 0, "bytes_up": 0, "seconds": 0.5}
    kept = torch.arange(9) < 3

    def books(state: torch.Tensor, rows: list[dict[str, Any]]) -> Books:
        save_checkpoint(paths.checkpoints, "last", 1, {"state": state}, {"rows": rows, "report": []})
        return Books(paths, eligible, None, 0, (0, 0))

    assert books(kept, [row]).done == 1
    for state, rows in (
        (kept, [{**row, "iteration": 2}]),
        (kept, [row, row]),
        (kept, [{**row, "active": 4}]),
        (torch.zeros(9, dtype=torch.bool), [{**row, "active": 0}]),
    ):
        with refused("not what its iterations say"):
            books(state, rows)
    for state in (kept[:-1], kept.float(), kept[None]):
        with refused("not of this edit"):
            books(state, [row])


def test_files_of_their_own_makers_are_read_by_one_function():
    """No reader asks the library for tensors before a schema has read the header."""
    sources = Path(__file__).parents[2] / "src/fedtalos"
    asks = {
        str(path.relative_to(sources))
        for path in sources.rglob("*.py")
        if re.search(r"^from safetensors\S* import (.*, )?load(_file)?\b", path.read_text("utf-8"), re.MULTILINE)
    }
    assert {name for name in asks if not name.startswith("fleet/")} == {"tensor_file.py"}
