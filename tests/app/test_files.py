"""Masks and checkpoints on disk (any bit of them: test_fuzz.py)."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from conftest import mask_header
from hypothesis import given
from hypothesis import strategies as st

from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.errors import InputError
from fedtalos.files import write_atomic
from fedtalos.randomness import generator
from fedtalos.training.editing.combine import chance_overlap, overlap, votes_needed
from fedtalos.training.editing.describe import density_table
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.mask_file import check_mask, read_mask_file, write_mask_file
from fedtalos.training.optimizer_state import optimizer_tensors, restore_optimizer


def facts(vit, mask, **changes):
    return replace(mask_header(mask, vit.architecture.as_dict()), **changes)


@pytest.fixture
def mask(vit):
    rng = generator(0, "mask")
    return {name: t & torch.from_numpy(rng.random(t.shape) < 0.3) for name, t in eligible_entries(vit).masks.items()}


def test_a_mask_comes_back_bit_for_bit_at_one_bit_an_entry(tmp_path, vit, mask):
    path = tmp_path / "m.safetensors"
    write_mask_file(path, mask, facts(vit, mask))
    loaded, loaded_facts = read_mask_file(path)
    assert loaded.keys() == mask.keys()
    assert all(torch.equal(loaded[name], mask[name]) for name in mask)
    assert loaded_facts == facts(vit, mask)
    entries = sum(t.numel() for t in mask.values())
    assert path.stat().st_size < entries / 8 + 15_000
    check(vit, loaded, loaded_facts)


def check(vit, mask, facts, force=False):
    check_mask(Path("m.safetensors"), mask, facts, vit, force=force)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": "those of yesterday"}, "m.safetensors: not made for this: weights those of yesterday / none"),
        ({"model": {"size": "micro", "patch_size": 4}}, "not made for this: patch_size 4 / 2 .* add force_mask"),
    ],
)
def test_a_mask_made_for_something_else_is_refused_unless_forced(vit, mask, changes, says):
    made = facts(vit, mask, **changes)
    with pytest.raises(InputError, match=says):
        check(vit, mask, made)
    check(vit, mask, made, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_mask_that_does_not_fit_is_refused_even_by_force(vit, mask, force):
    other = mask | {"blocks.0.attn.qkv.weight": torch.ones(3, 3, dtype=torch.bool)}
    with pytest.raises(InputError, match=r"blocks.0.attn.qkv.weight has shape \(3, 3\), here \(288, 96\)"):
        check(vit, other, facts(vit, other), force=force)


@given(st.integers(1, 300), st.integers(1, 100))
def test_votes_needed(masks, per_cent):
    def votes(rule, quorum=0.5):
        return votes_needed(rule, masks, quorum)

    assert votes("union") == 1
    assert votes("intersection") == votes("vote", 1.0) == masks
    assert 2 * votes("majority") > masks >= 2 * (votes("majority") - 1)
    enough = [count for count in range(1, masks + 1) if count >= Fraction(per_cent, 100) * masks]
    assert votes("vote", per_cent / 100) == enough[0]


def test_density_table_counts_every_entry_once(mask):
    rows = density_table(mask, "blocks")
    assert len(rows) == 6 * 8
    assert sum(row.active for row in rows) == sum(int(t.sum()) for t in mask.values())
    assert sum(row.entries for row in rows) == sum(t.numel() for t in mask.values()) - 6 * 96  # without the key biases
    q = next(row for row in rows if (row.block, row.kind) == (2, "q"))
    assert q.active == int(mask["blocks.2.attn.qkv.weight"][:96].sum())


def test_density_counts_eligible_entries_only(vit):
    masks = eligible_entries(vit, "qk").masks
    rows = density_table(masks, "qk")
    assert {row.kind for row in rows} == {"q", "k", "biases"}
    assert all(row.density == 1 for row in rows)


def test_overlap():
    one = {"blocks.0.a": torch.tensor([True, True, False, False])}
    two = {"blocks.0.a": torch.tensor([False, True, True, False])}
    assert overlap(one, two) == pytest.approx(1 / 3)
    assert overlap(one, one) == 1
    assert overlap(one, two | {"blocks.0.b": torch.tensor([True, False])}) == pytest.approx(1 / 4)
    with pytest.raises(InputError, match="different models"):
        overlap(one, {"blocks.0.a": torch.ones(5, dtype=torch.bool)})


def test_chance_overlap_is_what_all_pairs_of_such_masks_give():
    """By enumeration: every mask of two tensors with so many entries each, against every other such mask."""
    names = {
        "blocks.0.norm1.weight": (4, 2, 1),
        "blocks.0.norm1.bias": (3, 1, 2),
    }  # entries, of the first, of the second

    def masks(which: int) -> list[dict[str, torch.Tensor]]:
        choices = [list(combinations(range(numbers[0]), numbers[which])) for numbers in names.values()]
        return [
            {
                name: torch.tensor([entry in chosen for entry in range(numbers[0])])
                for (name, numbers), chosen in zip(names.items(), those, strict=True)
            }
            for those in product(*choices)
        ]

    pairs = list(product(masks(1), masks(2)))
    both = sum(sum(int((a[name] & b[name]).sum()) for name in names) for a, b in pairs) / len(pairs)
    either = sum(sum(int((a[name] | b[name]).sum()) for name in names) for a, b in pairs) / len(pairs)
    assert chance_overlap(*pairs[0]) == chance_overlap(*pairs[-1]) == pytest.approx(both / either)


def test_chance_knows_q_k_and_v_apart_and_what_is_eligible(vit):
    some = {name: torch.zeros_like(tensor) for name, tensor in eligible_entries(vit, "qk").masks.items()}
    q = some["blocks.0.attn.qkv.weight"][:96]
    q[:48] = True  # half of q, nothing of k
    assert chance_overlap(some, some, ("qk", "qk")) == pytest.approx((48 * 96 / 2) / (48 * 96 * 3 / 2))
    assert chance_overlap(some, {}) == 0
    assert chance_overlap({}, {}) == 1
    every = eligible_entries(vit).masks
    assert chance_overlap(every, every) == overlap(every, every) == 1
    with pytest.raises(InputError, match="different models"):
        chance_overlap(some, {"blocks.0.attn.qkv.weight": torch.ones(5, dtype=torch.bool)})


def test_a_checkpoint_comes_back_and_replaces_the_one_before(tmp_path):
    tensors = {"w": torch.randn(3, 4), "optimizer/0/step": torch.tensor(3.0)}
    save_checkpoint(tmp_path, "last", 1, tensors, {"a": 1})
    path = save_checkpoint(tmp_path, "last", 2, tensors, {"a": 2})
    loaded = load_checkpoint(path)
    assert loaded.facts["a"] == 2
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-000002.safetensors", "last.json"]


@pytest.mark.parametrize("damage", ["cut", "missing", "json", "format", "seal"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = save_checkpoint(tmp_path, "last", 1, {"w": torch.randn(30)}, {})
    file = tmp_path / "last-000001.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "missing":
        file.unlink()
    elif damage == "json":
        path.write_text("{")
    elif damage == "format":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 2}))
    with pytest.raises(InputError, match="last"):
        load_checkpoint(path)


@pytest.mark.parametrize("rule", [torch.optim.AdamW, torch.optim.SGD])
def test_optimiser_state_comes_back(tmp_path, rule):
    def steps(optimizer, parameter, numbers):
        for number in numbers:
            parameter.grad = torch.full((5,), float(number))
            optimizer.step()

    options = {"lr": 0.1} | ({"momentum": 0.9} if rule is torch.optim.SGD else {})
    straight = torch.nn.Parameter(torch.ones(5))
    optimizer = rule([straight], **options)
    steps(optimizer, straight, (1, 2))
    path = save_checkpoint(tmp_path, "last", 2, {"w": straight, **optimizer_tensors(optimizer)}, {})
    resumed = torch.nn.Parameter(load_checkpoint(path).tensors["w"])
    again = rule([resumed], **options)
    restore_optimizer(again, load_checkpoint(path).tensors)
    steps(optimizer, straight, (3, 4))
    steps(again, resumed, (3, 4))
    assert torch.equal(straight, resumed)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
