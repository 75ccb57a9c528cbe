"""Merging rules against their papers' formulas, written out plainly, on vectors of different supports."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import fedtalos as ft
from fedtalos.data.images import LabelledImages
from fedtalos.models.load import build_model
from fedtalos.models.vision_transformer import Architecture
from fedtalos.notes import noted
from fedtalos.training.editing.merging import Method
from fedtalos.training.editing.merging_by_svd import nearest_orthonormal
from fedtalos.training.editing.merging_by_value import depths, randomly_dropped, tall, trimmed
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.editing.vector_facts import VectorFacts

SHAPES = {"blocks.0.fc.weight": (4, 3), "blocks.0.fc.bias": (4,), "blocks.1.fc.weight": (3, 4), "norm.bias": (3,)}
METHODS = get_args(Method)


def vector(seed, density=0.6, values=None):
    """A random vector of the tensors above; ``values`` are as many as they have entries, dense."""
    rng, mask, found = np.random.default_rng(seed), {}, []
    for name, shape in SHAPES.items():
        where = torch.from_numpy(rng.random(shape) < density) if values is None else torch.ones(shape, dtype=torch.bool)
        if where.any():
            mask[name] = where
            found.append(rng.standard_normal(int(where.sum())))
    flat = torch.from_numpy(np.concatenate(found) if values is None else values).float()
    return TaskVector(mask, flat, VectorFacts(weights="w", model={"size": "micro"}, parameters=100))


def dense(tau):
    """By name, numpy arrays of every tensor, 0 outside the support."""
    found = tau.tensors()
    return {name: found[name].double().numpy() if name in found else np.zeros(s) for name, s in SHAPES.items()}


def stacked(vectors):
    return {name: np.stack([dense(tau)[name] for tau in vectors]) for name in SHAPES}


def data_for(vectors):
    rng = np.random.default_rng(9)
    scores = [{n: torch.from_numpy(rng.random(s)).float() for n, s in SHAPES.items()} for _ in vectors]
    moments = [
        {n: torch.from_numpy(rng.random(s[1])).float() for n, s in SHAPES.items() if len(s) == 2} for _ in vectors
    ]
    return {"scores": scores, "moments": moments}


def merged(vectors, method, **arguments):
    data = {"fisher": "scores", "regmean": "moments"}
    arguments |= {key: value for key, value in data_for(vectors).items() if data.get(method) == key}
    return ft.merge(vectors, method, **arguments)


def check(found, expected):
    for name, tensor in dense(found).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=2e-6, atol=1e-7, err_msg=name)


THREE = [vector(0), vector(1), vector(2)]


def test_sum_and_mean():
    check(merged(THREE, "sum"), {name: values.sum(0) for name, values in stacked(THREE).items()})
    check(merged(THREE, "mean"), {name: values.mean(0) for name, values in stacked(THREE).items()})
    weighted = {name: np.average(values, axis=0, weights=[5, 3, 2]) for name, values in stacked(THREE).items()}
    check(merged(THREE, "mean", weights=[5, 3, 2]), weighted)


def trimmed_by_hand(tau, share):
    """The k largest of the support, k a share of it and not of all entries."""
    values, keep = dense(tau), max(1, round(share * len(tau)))
    every = np.concatenate([value.ravel() for value in values.values()])
    least = np.sort(np.abs(every))[-keep]
    return {name: np.where(np.abs(value) >= least, value, 0) for name, value in values.items()}


def test_ties():
    for share in (0.2, 0.5, 1.0):
        cut = [trimmed_by_hand(tau, share) for tau in THREE]
        expected = {}
        for name, shape in SHAPES.items():
            expected[name] = np.zeros(shape)
            for at in np.ndindex(shape):
                values = [values[name][at] for values in cut]
                elected = np.sign(sum(values))
                agreeing = [value for value in values if np.sign(value) == elected and value]
                expected[name][at] = np.mean(agreeing) if agreeing else 0
        check(merged(THREE, "ties", share=share), expected)


def test_trimming_is_by_share_of_the_support():
    tau = vector(0, density=0.2)
    kept = trimmed(tau, 0.5)
    assert int((kept.values != 0).sum()) == round(0.5 * len(tau))
    assert len(kept) == len(tau)
    assert float(kept.values.abs()[kept.values != 0].min()) >= float(tau.values.abs()[kept.values == 0].max())


def test_dare():
    tau = TaskVector(
        {"x": torch.ones(20_000, dtype=torch.bool)}, torch.ones(20_000), replace(THREE[0].facts, parameters=20_000)
    )
    for drop in (0.0, 0.5, 0.9):
        values = ft.merge([tau], "dare", drop=drop, seed=3).values
        assert values[values != 0].unique().tolist() == pytest.approx([1 / (1 - drop)])
        assert float(values.mean()) == pytest.approx(1, abs=0.1)
        assert float((values == 0).float().mean()) == pytest.approx(drop, abs=0.02)
    one, same, other = (randomly_dropped(tau, 0.5, seed) for seed in (0, 0, 1))
    assert torch.equal(one.values, same.values)
    assert not torch.equal(one.values, other.values)
    assert not torch.equal(one.values, randomly_dropped(tau, 0.5, 0, number=1).values)  # each vector draws for itself


def test_magmax():
    expected = {
        name: np.take_along_axis(values, np.abs(values).argmax(0)[None], 0)[0]
        for name, values in stacked(THREE).items()
    }
    check(merged(THREE, "magmax"), expected)


@pytest.mark.parametrize(("votes", "selectivity"), [(1, 0.4), (2, 0.4), (2, 0.0), (3, 0.2)])
def test_consensus(votes, selectivity):
    expected = {}
    for name, values in stacked(THREE).items():
        total = values.sum(0)
        needed = (np.abs(values) >= selectivity * np.abs(total - values)) & (values != 0)
        expected[name] = total * (needed.sum(0) >= votes)
    check(merged(THREE, "consensus", votes=votes, selectivity=selectivity), expected)


def test_an_entry_outside_the_support_is_needed_by_no_one():
    assert tall(torch.tensor([[0.0], [1.0]]), torch.tensor([1.0]), 0.0).tolist() == [[False], [True]]
    apart = [
        TaskVector({"x": torch.tensor([True, False])}, torch.ones(1), THREE[0].facts),
        TaskVector({"x": torch.tensor([False, True])}, torch.ones(1), THREE[0].facts),
    ]
    with pytest.raises(ft.InputError, match="fewer votes"):
        ft.merge(apart, "consensus", votes=2)
    assert ft.merge(apart, "consensus", votes=1).values.tolist() == [1, 1]


def test_lines_scales_linearly_with_depth():
    names = ["pos_embed", "blocks.0.x", "blocks.1.x", "blocks.2.x", "norm.bias", "head.bias"]
    assert list(depths(names, blocks=3).values()) == [0, 0, 0.5, 1, 1, 1]
    depth = {"blocks.0.fc.weight": 0, "blocks.0.fc.bias": 0, "blocks.1.fc.weight": 1 / 5, "norm.bias": 1}  # of 6 blocks
    for first, last, how in ((0.2, 1.5, {"first": 0.2, "last": 1.5}), (1 / 3, 1.0, {})):
        expected = {n: (first + (last - first) * depth[n]) * values.sum(0) for n, values in stacked(THREE).items()}
        check(merged(THREE, "lines", **how), expected)
    noted()
    unknown = [replace(one, facts=replace(one.facts, model={"name": "resnet"})) for one in THREE]
    merged(unknown, "lines")
    assert "no blocks are known" in noted()["lines"]


def test_fisher_weighs_entries():
    scores = data_for(THREE)["scores"]
    expected = {}
    for name, values in stacked(THREE).items():
        weights = np.stack([score[name].double().numpy() for score in scores])
        expected[name] = (weights * values).sum(0) / weights.sum(0)
    where = {name: np.any([dense(tau)[name] != 0 for tau in THREE], 0) for name in SHAPES}
    check(merged(THREE, "fisher"), {name: value * where[name] for name, value in expected.items()})
    nothing = [{name: torch.zeros(shape) for name, shape in SHAPES.items()}] * 3
    check(ft.merge(THREE, "fisher", scores=nothing), dense(merged(THREE, "mean")))


def test_regmean_solves_least_squares_of_diagonal_moments():
    """(sum G)^-1 sum G W, with W (inputs, outputs) as in the paper; what is no matrix is averaged."""
    moments, expected = data_for(THREE)["moments"], {}
    for name, values in stacked(THREE).items():
        if values[0].ndim != 2:
            expected[name] = values.mean(0)
            continue
        grams = [np.diag(moment[name].double().numpy()) for moment in moments]
        expected[name] = np.linalg.solve(sum(grams), sum(g @ w.T for g, w in zip(grams, values, strict=True))).T
    check(merged(THREE, "regmean"), expected)


def full(seed):
    rng = np.random.default_rng(seed)
    return vector(0, values=rng.standard_normal(sum(math.prod(shape) for shape in SHAPES.values())))


FULL = [full(0), full(1), full(2)]


def tsv_by_hand(matrices):
    """Algorithm 1: truncate each to R / T, put side by side, orthogonalise by Procrustes, multiply."""
    lefts, values, rights = [], [], []
    kept = max(1, min(matrices[0].shape) // len(matrices))
    for matrix in matrices:
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        lefts.append(u[:, :kept])
        values.append(s[:kept])
        rights.append(v[:kept])

    def orthogonal(matrix):
        p, _, q = np.linalg.svd(matrix, full_matrices=False)
        return p @ q

    return orthogonal(np.hstack(lefts)) @ np.diag(np.concatenate(values)) @ orthogonal(np.vstack(rights))


def iso_by_hand(matrices):
    u, s, v = np.linalg.svd(np.sum(matrices, 0), full_matrices=False)
    return u @ np.diag(np.full(len(s), s.mean())) @ v


@pytest.mark.parametrize(("method", "by_hand"), [("tsv", tsv_by_hand), ("iso_c", iso_by_hand)])
def test_rules_by_singular_values(method, by_hand):
    noted()
    expected = {n: by_hand(list(v)) if v[0].ndim == 2 else v.mean(0) for n, v in stacked(FULL).items()}
    check(merged(FULL, method), expected)
    assert not noted()  # nothing lies outside a dense support


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_sparse_supports_cut_matrices_and_say_how_much(method):
    noted()
    found = merged(THREE, method)
    said = next(iter(noted().values()))
    assert "lies outside the vectors' support" in said
    assert 0 < float(said.split()[0]) < 100
    union = {name: np.any([dense(tau)[name] != 0 for tau in THREE], 0) for name in SHAPES}
    for name, tensor in dense(found).items():
        assert not tensor[~union[name]].any()


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_rows_and_columns_that_never_move_make_no_difference(method):
    """Embedded in a larger weight, the same matrices give the same entries."""
    small = [torch.randn(3, 2, dtype=torch.float64).float() for _ in range(2)]

    def vectors(shape, rows, columns):
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[rows, columns] = True
        return [TaskVector({"x": mask}, values.reshape(-1), THREE[0].facts) for values in small]

    alone = ft.merge(vectors((3, 2), slice(None), slice(None)), method)
    inside = ft.merge(vectors((5, 4), slice(1, 4), slice(2, 4)), method)
    assert torch.allclose(alone.values, inside.values, atol=1e-6)


def test_nearest_orthonormal_is_orthonormal():
    for shape in ((5, 3), (3, 5)):
        found = nearest_orthonormal(torch.randn(shape, dtype=torch.float64))
        gram = found.T @ found if shape[0] > shape[1] else found @ found.T
        assert torch.allclose(gram, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_leaves_the_union_and_depends_on_no_others(method):
    found = merged(THREE, method, **({"votes": 1, "selectivity": 0.0} if method == "consensus" else {}))
    union = {name: np.any([dense(tau)[name] != 0 for tau in THREE], 0) for name in SHAPES}
    for name, tensor in dense(found).items():
        assert not tensor[~union[name]].any()
    assert len(found) == sum(int(where.sum()) for where in union.values())
    assert found.facts.made_from == tuple(tau.fingerprint for tau in THREE) or method in ("ties", "dare")


SAME = ["mean", "ties", "magmax", "fisher", "regmean"]


@given(arrays.arrays(np.float32, 31, elements=st.floats(-100, 100, width=32)), st.sampled_from(SAME))
def test_means_of_a_vector_with_itself_are_the_vector(values, method):
    tau = vector(0, values=values)
    found = merged([tau, tau], method, **({"share": 1.0} if method == "ties" else {}))
    assert torch.allclose(found.values, tau.values, rtol=1e-6, atol=1e-30)


@given(st.permutations(range(3)), st.sampled_from(["sum", "mean", "ties", "consensus", "lines", "tsv", "iso_c"]))
def test_the_order_of_vectors_does_not_matter(order, method):
    """MagMax and DARE are not here: the first of equals wins, and each vector draws by its place."""
    found, other = merged(THREE, method), merged([THREE[number] for number in order], method)
    check(found, dense(other))


@given(st.floats(0.015625, 64, width=32), st.sampled_from(METHODS))
def test_rules_scale_with_their_vectors(factor, method):
    """A power of two would be exact; others are to rounding."""
    factor = 2.0 ** round(math.log2(factor))
    check(merged([factor * tau for tau in THREE], method), dense(factor * merged(THREE, method)))


@pytest.mark.parametrize(
    ("method", "arguments", "says"),
    [
        ("averages", {}, "expected one of sum, mean"),
        ("mean", {"weights": [1.0]}, "weights"),
        ("mean", {"weights": [1.0, -1.0, 1.0]}, "weights"),
        ("mean", {"weights": [0.0, 0.0, 0.0]}, "weights"),
        ("ties", {"share": 0.0}, "share"),
        ("ties", {"share": math.nan}, "share"),
        ("dare", {"drop": 1.0}, "drop"),
        ("dare", {"drop": math.nan}, "drop"),
        ("consensus", {"votes": 4}, "votes"),
        ("consensus", {"selectivity": math.nan}, "selectivity"),
        ("fisher", {}, "scores"),
        ("regmean", {"moments": [{}]}, "moments"),
        ("lines", {"last": math.inf}, "NaN or infinity|last"),
    ],
)
def test_bad_arguments_are_refused(method, arguments, says):
    with pytest.raises(ft.InputError, match=says):
        ft.merge(THREE, method, **arguments)


def test_nothing_is_merged_to_nothing():
    for method in METHODS:
        with pytest.raises(ft.InputError):
            merged([], method)


def test_input_moments_are_sums_of_squares_that_add_up():
    model = build_model(Architecture("micro", 8, 4, 5))
    images = LabelledImages((torch.rand(12, 3, 8, 8) * 255).byte(), torch.arange(12) % 5)
    whole = ft.input_moments(model, images)
    halves = [ft.input_moments(model, images.slice(0, 5)), ft.input_moments(model, images.slice(5, None))]
    for name, total in whole.items():
        assert total.shape == (model.get_parameter(name).shape[1],)
        assert torch.allclose(total, halves[0][name] + halves[1][name], rtol=1e-4)
    from fedtalos.training.feature_cache import FeatureStore

    features, _ = FeatureStore().features(model, images)
    assert torch.allclose(whole["head.weight"], features.square().sum(0), rtol=1e-4)
    assert set(whole) == {name for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 2}
