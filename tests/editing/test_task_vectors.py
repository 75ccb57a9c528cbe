"""Task vectors: sums, exact inverses, files and the factor alpha."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

import fedtalos as ft
from fedtalos.data.images import LabelledImages
from fedtalos.files import UNSEALED, sealed
from fedtalos.models.load import build_model
from fedtalos.models.vision_transformer import Architecture
from fedtalos.notes import noted
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.alpha_search import GRID
from fedtalos.training.editing.describe_vectors import cosines, described, norm_table
from fedtalos.training.editing.disentanglement import (
    disentanglement_of_all,
    interval,
    normalised_accuracy,
    predictions,
)
from fedtalos.training.editing.task_vectors import TaskVector, weighted_sum
from fedtalos.training.editing.vector_facts import VectorFacts
from fedtalos.training.entries import named_tensors

SMALLEST = Architecture("micro", 8, 4, 5)


@pytest.fixture(scope="module")
def base():
    return build_model(SMALLEST)


def shifted(model, seed=0, density=0.1, size=1e-2):
    """The model after a training: a random part of its blocks moved a little, and the mask of that part."""
    after, mask = copy.deepcopy(model), ft.random_mask(model, density=density, seed=seed)
    generator = torch_generator(seed, "shift")
    for name, tensor in named_tensors(after).items():
        if name in mask:
            tensor[mask[name]] += size * torch.randn(int(mask[name].sum()), generator=generator)
    return after, mask


@pytest.fixture(scope="module")
def taus(base):
    return [ft.task_vector(base, shifted(base, seed)[0], classes=tuple("abcde"), task=("a",)) for seed in range(3)]


def same(first, second):
    theirs = named_tensors(second)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in named_tensors(first).items())


def vector(values, mask=None, **facts):
    """A vector of one tensor `x`."""
    values = torch.as_tensor(values, dtype=torch.float32)
    mask = torch.ones(len(values), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    said = {"weights": "w", "model": {"size": "micro"}, "parameters": 100} | facts
    return TaskVector({"x": mask}, values, VectorFacts(**said))


def test_a_vector_is_what_moved_and_nothing_else(base):
    after, mask = shifted(base)
    tau = ft.task_vector(base, after)
    assert {name: tensor.tolist() for name, tensor in tau.mask.items()} == {
        name: tensor.tolist() for name, tensor in mask.items() if tensor.any()
    }
    for name, tensor in tau.tensors().items():
        expected = named_tensors(after)[name] - named_tensors(base)[name]
        assert torch.equal(tensor, expected)
    assert tau.density == pytest.approx(len(tau) / sum(p.numel() for p in base.parameters()))
    assert tau.norm == pytest.approx(math.sqrt(sum(float(t.double().square().sum()) for t in tau.tensors().values())))
    assert tau.facts.weights == base.origin.fingerprint


def test_a_mask_is_the_support_and_what_moved_outside_is_noted(base):
    after, mask = shifted(base)
    with torch.no_grad():
        after.head.bias.add_(1)
    wider = {name: torch.ones_like(tensor) for name, tensor in mask.items()}
    noted()
    tau = ft.task_vector(base, after, wider)
    assert len(tau) == sum(tensor.numel() for tensor in wider.values())
    assert "5 entries moved outside" in noted()["task vector"]
    assert ft.task_vector(dict(base.state_dict()), after).fingerprint == ft.task_vector(base, after).fingerprint


def test_applied_and_subtracted_a_training_gives_the_base_back_to_the_bit(base):
    """No entry of these was halved or doubled: Sterbenz."""
    after, mask = shifted(base, size=0)
    for name, tensor in named_tensors(after).items():
        if name in mask:
            tensor[mask[name]] *= 1.3
    tau = ft.task_vector(base, after)
    before = copy.deepcopy(base)
    edited = ft.apply(base, tau)
    assert same(edited, after)
    assert same(base, before)
    assert same(ft.apply(edited, -tau), base)
    assert same(ft.apply(edited, tau, alpha=-1.0), base)


FLOATS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=40)
@given(arrays.arrays(np.float32, 7, elements=FLOATS), arrays.arrays(np.float32, 7, elements=FLOATS), st.floats(-3, 3))
def test_the_inverse_is_exact_to_the_stated_rounding(theta, tau, alpha):
    model = build_model(SMALLEST)
    entry = torch.zeros_like(model.blocks[0].norm1.bias, dtype=torch.bool)
    entry[:7] = True
    with torch.no_grad():
        model.blocks[0].norm1.bias[:7] = torch.from_numpy(theta)
    facts = VectorFacts(weights=model.origin.fingerprint, model=SMALLEST.as_dict(), parameters=10**6)
    change = TaskVector({"blocks.0.norm1.bias": entry}, torch.from_numpy(tau), facts)
    edited = ft.apply(model, change, alpha=alpha)
    back = ft.apply(edited, change, alpha=-alpha).blocks[0].norm1.bias.detach()[:7].double().numpy()
    moved = edited.blocks[0].norm1.bias.detach()[:7].double().numpy()
    largest = np.maximum(np.abs(theta.astype(np.float64)), np.abs(moved))
    assert (np.abs(back - theta) <= 2**-23 * (1 + 1e-6) * largest + 2**-149).all()


@given(arrays.arrays(np.float32, 9, elements=FLOATS), arrays.arrays(np.float32, 9, elements=FLOATS))
def test_vectors_add_as_numbers_do(one, other):
    first, second = vector(one), vector(other)
    assert torch.equal((first + second).values, (second + first).values)
    assert torch.equal((first + second).values, (first.values.double() + second.values.double()).float())
    assert torch.equal((first - second).values, (first + -second).values)
    assert not (first - first).values.any()
    assert torch.equal((2 * first).values, (first + first).values)
    assert torch.equal((first * 0.25).values, first.values / 4)


def test_a_sum_is_on_the_union_and_as_applying_all(base, taus):
    total = taus[0] + taus[1] + taus[2]
    for name, tensor in total.mask.items():
        assert torch.equal(tensor, torch.stack([tau.mask.get(name, torch.zeros_like(tensor)) for tau in taus]).any(0))
    one, three = ft.apply(base, total), ft.apply(base, *taus)
    theirs = named_tensors(three)
    for name, tensor in named_tensors(one).items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-6, atol=1e-9)
    assert total.facts.task == ("a",)
    assert (taus[0] + taus[1]).facts.made_from == (taus[0].fingerprint, taus[1].fingerprint)


def test_a_small_step_survives_a_large_one():
    """Sums are rounded once."""
    total = weighted_sum([vector([2.0**30]), vector([1.0]), vector([-(2.0**30)])], [1.0, 1.0, 1.0], "sum")
    assert total.values.item() == 1.0


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (vector([1.0], weights="others"), "weights w / others"),
        (vector([1.0], model={"size": "tiny"}), "size micro / tiny"),
        (vector([1.0, 2.0]), "differs in shape"),
        (vector([1.0], classes=("cat",)), "different classes"),
    ],
)
def test_vectors_that_do_not_add_are_refused_in_words(other, says):
    with pytest.raises(ft.InputError, match=says):
        vector([1.0], classes=("dog",)) + other


def test_moved_heads_add_only_where_they_were_one(base):
    after = copy.deepcopy(base)
    with torch.no_grad():
        after.head.bias.add_(1)
    first = ft.task_vector(base, after)
    other = replace(first, facts=replace(first.facts, head="another"))
    with pytest.raises(ft.InputError, match="different heads"):
        first + other


@pytest.mark.parametrize("values", [[math.nan], [math.inf], []])
def test_bad_values_make_no_vector(values):
    with pytest.raises(ft.InputError, match=r"NaN or infinity|at least one entry"):
        vector(values, mask=[True] if values else [False])


@pytest.mark.parametrize("alpha", [math.nan, math.inf, "0.4", True, None])
def test_alpha_is_a_finite_number(base, taus, alpha):
    with pytest.raises(ft.InputError, match="alpha"):
        ft.apply(base, taus[0], alpha=alpha)


def test_what_does_not_fit_is_refused(base, taus):
    with pytest.raises(ft.InputError, match="weights"):
        ft.apply(build_model(SMALLEST, seed=1), taus[0])
    with pytest.raises(ft.InputError, match="would hold infinity"):
        ft.apply(base, 1e38 * (1 / float(taus[0].values.abs().max()) * taus[0]), alpha=1e5)
    with pytest.raises(ft.InputError, match="are the same"):
        ft.task_vector(base, copy.deepcopy(base))
    with pytest.raises(ft.InputError, match="at least one model"):
        ft.task_vector(dict(base.state_dict()), dict(base.state_dict()))
    with pytest.raises(ft.InputError, match="of another shape"):
        ft.task_vector(base, build_model(Architecture("micro", 8, 4, 7)))
    with pytest.raises(ft.InputError, match="no parameter of this model"):
        ft.task_vector(base, shifted(base)[0], {"nothing": torch.ones(1, dtype=torch.bool)})


def test_a_file_gives_back_what_was_saved(base, taus, tmp_path):
    path = tmp_path / "tau.safetensors"
    ft.save_vector(path, taus[0])
    read = ft.load_vector(path, base)
    assert read.facts == taus[0].facts
    assert read.fingerprint == taus[0].fingerprint
    assert all(torch.equal(a, b) for a, b in zip(read.head, taus[0].head, strict=True))
    bits = sum(-(-tensor.numel() // 8) for tensor in taus[0].mask.values())
    assert path.stat().st_size < 4 * len(taus[0]) + bits + 30_000
    with pytest.raises(ft.InputError, match="not made on this model"):
        ft.load_vector(path, build_model(SMALLEST, seed=1))


def rewritten(path, change):
    """The file with other facts or arrays, sealed anew: a stranger's, who knows the format."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fedtalos_vector"])
    found = load_safetensors(content)
    header["seal"] = UNSEALED
    change(header, found)
    path.write_bytes(sealed(save_safetensors(found, metadata={"fedtalos_vector": json.dumps(header)})))


def spoil(name, value):
    def change(_header, found):
        found[name] = found[name].copy()
        found[name].flat[0] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda header, _: header.update(format=99),
        lambda header, _: header["facts"].update(weights=3),
        lambda header, _: header["facts"].update(command="\x1b[31m"),
        lambda header, _: header["facts"].update(parameters=1),
        lambda header, _: header["facts"].update(strange=1),
        lambda header, _: header.update(active=header["active"] - 1),
        lambda header, _: header["facts"].update(head="another"),
        lambda header, _: header["shapes"].update({next(iter(header["shapes"])): [3]}),
        lambda _, found: found.update(values=found["values"][:-1]),
        lambda _, found: found.update(values=found["values"].astype(np.float64)),
        lambda _, found: found.pop("head/bias"),
        lambda _, found: found.pop("values"),
        spoil("values", np.nan),
        spoil("head/weight", np.inf),
        spoil("head/weight", 3.0),
    ],
)
def test_files_that_say_other_things_are_refused(taus, tmp_path, change):
    path = tmp_path / "tau.safetensors"
    ft.save_vector(path, taus[0])
    rewritten(path, lambda *_: None)
    ft.load_vector(path)
    rewritten(path, change)
    with pytest.raises(ft.InputError, match=r"^vector .*tau") as caught:
        ft.load_vector(path)
    assert len(str(caught.value)) < 300


def test_broken_files_are_refused(taus, tmp_path):
    path = tmp_path / "tau.safetensors"
    ft.save_vector(path, taus[0])
    content = path.read_bytes()
    for broken in (b"", content[:-5], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], b"x" * 100):
        path.write_bytes(broken)
        with pytest.raises(ft.InputError, match="vector"):
            ft.load_vector(path)
    with pytest.raises(ft.InputError, match="no such file"):
        ft.load_vector(tmp_path / "none.safetensors")


def distance_to(model, target, name="blocks.0.attn.qkv.weight"):
    return -float((named_tensors(model)[name] - named_tensors(target)[name]).norm())


@pytest.mark.parametrize("best", [0.0, 0.25, 0.7, 1.3])
def test_best_alpha_finds_the_peak_with_about_a_dozen_evaluations(base, taus, best):
    target = ft.apply(base, taus[0], alpha=best)
    asked = []

    def measure(edited):
        asked.append(1)
        return distance_to(edited, target)

    found = ft.best_alpha(base, taus[0], measure)
    assert len(asked) == len(found.tried) <= 12
    assert found.value == max(found.tried.values()) >= found.tried[0.0]
    assert found.alpha == pytest.approx(best, rel=0.25, abs=0.02)


def test_best_alpha_notes_an_edge_and_never_falls_below_the_base(base, taus):
    noted()
    far = ft.apply(base, taus[0], alpha=9.0)
    assert ft.best_alpha(base, taus[0], lambda edited: distance_to(edited, far)).alpha == GRID[-1]
    assert "largest of the grid" in noted()["alpha"]
    behind = ft.apply(base, taus[0], alpha=-1.0)
    assert ft.best_alpha(base, taus[0], lambda edited: distance_to(edited, behind)).alpha == 0.0
    assert "every other is worse" in noted()["alpha"]
    near, beside = (ft.apply(base, taus[0], alpha=alpha) for alpha in (0.02, 0.09))
    assert ft.best_alpha(base, taus[0], lambda edited: distance_to(edited, near)).alpha == 0.025
    assert "smallest tried" in noted()["alpha"]
    assert 0.05 < ft.best_alpha(base, taus[0], lambda edited: distance_to(edited, beside)).alpha <= 0.1
    assert "alpha" not in noted()  # 0.05 was tried, too
    measured = iter([0.5] + [math.nan] * 99)
    assert ft.best_alpha(base, taus[0], lambda _: next(measured)).alpha == 0.0
    assert ft.best_alpha(base, taus[0], lambda _: math.nan).alpha == 0.0
    assert "nothing could be measured" in noted()["alpha"]
    with pytest.raises(ft.InputError, match="grid"):
        ft.best_alpha(base, taus[0], lambda _: 0.0, grid=[0.1, math.nan])


@pytest.fixture(scope="module")
def pictures():
    pixels = (torch.rand(30, 3, 8, 8, generator=torch_generator(0, "pictures")) * 255).byte()
    return LabelledImages(pixels, torch.arange(30) % 5)


def test_disentanglement_is_the_published_sum(base, taus, pictures):
    """Against the formula, written out."""
    vectors, images = [30 * tau for tau in taus[:2]], [pictures.slice(0, 18), pictures.slice(18, None)]
    alphas, classes = (0.0, 1.0), [(0, 1, 2), None]
    found = ft.disentanglement_error(base, vectors, images, alphas, classes=classes)
    for row, a1 in enumerate(alphas):
        for column, a2 in enumerate(alphas):
            both = ft.apply(base, a1 * vectors[0] + a2 * vectors[1])
            xi = 0.0
            for task, alpha in ((0, a1), (1, a2)):
                alone = ft.apply(base, vectors[task], alpha=alpha)
                x, y = (predictions(model, images[task], classes[task]) for model in (alone, both))
                xi += float((x != y).double().mean())
            assert found[row, column] == xi
    assert found[0, 0] == 0
    assert 0 < found.max() <= 2
    over_pairs, by_pair = disentanglement_of_all(base, [30 * tau for tau in taus], [pictures] * 3, classes=None)
    assert over_pairs.low <= over_pairs.mean <= over_pairs.high
    assert by_pair.keys() == {(0, 1), (0, 2), (1, 2)}
    with pytest.raises(ft.InputError, match="expected two"):
        ft.disentanglement_error(base, taus, [pictures] * 3)


def test_predictions_stay_among_the_classes(base, pictures):
    assert set(predictions(base, pictures, (1, 3)).tolist()) <= {1, 3}
    assert torch.equal(predictions(base, pictures), predictions(base, pictures, range(5)))


def test_figures_over_tasks():
    assert normalised_accuracy([0.9, 0.8], [0.9, 1.0]) == pytest.approx(0.9)
    assert normalised_accuracy([0.9, 0.1], [0.9, 0.0]) == 1.0
    assert normalised_accuracy([0.9, math.nan], [0.9, math.nan]) == 1.0  # a task without test images
    assert math.isnan(normalised_accuracy([0.1], [0.0]))
    found = interval([0.0, 1.0, 2.0])
    assert (found.mean, found.low < 1 < found.high) == (1.0, True)


def test_norms_by_block_and_kind_add_up(base, taus):
    after = ft.apply(base, taus[0])
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.01)
    tau = ft.task_vector(base, after)
    rows = norm_table(tau)
    assert math.sqrt(sum(row.norm**2 for row in rows)) == pytest.approx(tau.norm)
    assert sum(row.active for row in rows) == sum(row.entries for row in rows) == len(tau)
    assert {row.kind for row in rows if row.place == "-"} == {"conv", "norms", "embed", "head"}
    assert {row.kind for row in rows if row.place == "0"} == {"q", "k", "v", "proj", "fc1", "fc2", "norms", "biases"}
    assert described(tau)["moves"].startswith(f"{len(tau)} of")


def test_cosines_are_over_the_union(taus):
    found = cosines([taus[0], -taus[0], taus[1], taus[0] + taus[1]])
    assert np.allclose(np.diag(found), 1)
    assert found[0, 1] == pytest.approx(-1)
    assert found[0, 3] == pytest.approx(
        (taus[0].norm ** 2 + found[0, 2] * taus[0].norm * taus[1].norm) / (taus[0].norm * (taus[0] + taus[1]).norm)
    )
