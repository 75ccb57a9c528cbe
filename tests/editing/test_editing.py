import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtalos.randomness import generator
from fedtalos.training.editing.talos import (
    Groups,
    calibrate,
    eligible_entries,
    grouped,
    keep_lowest,
    keep_lowest_groups,
    score_by_weights,
    soften,
)
from fedtalos.training.masked_parameters import named_tensors

CRITERIA = ("lowest_magnitude", "highest_magnitude", "random")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 1000))
def test_exactly_count_lowest_are_kept(size, levels, seed):
    rng = generator(seed, "scores")
    scores = torch.from_numpy(rng.integers(0, levels, size)).float()  # few levels: many ties
    candidates = torch.from_numpy(rng.random(size) < 0.7)
    count = int(rng.integers(0, int(candidates.sum()) + 1))
    kept = keep_lowest(scores, candidates, count, seed, 1)
    assert int(kept.sum()) == count
    assert not (kept & ~candidates).any()
    left_out = candidates & ~kept
    if count and left_out.any():
        assert scores[kept].max() <= scores[left_out].min()
    assert torch.equal(kept, keep_lowest(scores, candidates, count, seed, 1))


def test_ties_are_drawn_not_taken_in_order():
    kept = keep_lowest(torch.zeros(1000), torch.ones(1000, dtype=torch.bool), 100, 0, 1)
    assert 20 < int(kept[:500].sum()) < 80
    assert not torch.equal(kept, keep_lowest(torch.zeros(1000), torch.ones(1000, dtype=torch.bool), 100, 1, 1))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1.0), st.integers(1, 6))
def test_densities_are_exact_and_refinement_is_monotone(density, iterations):
    torch.manual_seed(0)
    entries = [torch.rand(500) for _ in range(iterations)]
    seen = []

    def score(number, kept):
        seen.append(kept)
        return entries[number - 1]

    class Eligible:
        device = torch.device("cpu")

        def __len__(self):
            return 500

    before = torch.ones(500, dtype=torch.bool)
    for iteration in calibrate(score, Eligible(), density=density, iterations=iterations, seed=0):
        assert int(iteration.kept.sum()) == round(density ** (iteration.number / iterations) * 500)
        assert not (iteration.kept & ~before).any()
        assert torch.equal(seen[-1], before)
        before = iteration.kept


def test_design_densities():
    eligible = type("E", (), {"device": torch.device("cpu"), "__len__": lambda self: 10_000})()
    done = calibrate(lambda n, k: torch.arange(10_000.0), eligible, density=0.1, iterations=4, seed=0)
    assert [int(i.kept.sum()) for i in done] == [5623, 3162, 1778, 1000]


def test_lowest_scores_are_kept_not_the_highest():
    eligible = type("E", (), {"device": torch.device("cpu"), "__len__": lambda self: 10})()
    *_, last = calibrate(lambda n, k: torch.arange(10.0), eligible, density=0.3, iterations=2, seed=0)
    assert last.kept.nonzero().squeeze(1).tolist() == [0, 1, 2]


def test_resuming_equals_no_interruption(vit):
    eligible = eligible_entries(vit)
    scores = [torch.from_numpy(generator(i, "s").random(len(eligible))).float() for i in range(4)]

    def run(start=None, stop=4):
        kept = None
        for iteration in calibrate(
            lambda n, k: scores[n - 1] * k, eligible, density=0.1, iterations=4, seed=3, start=start
        ):
            kept = iteration.kept
            if iteration.number == stop:
                return kept
        return kept

    assert torch.equal(run(), run(start=(2, run(stop=2))))


def test_soften_multiplies_only_excluded_eligible_entries(vit):
    eligible = eligible_entries(vit)
    kept = torch.from_numpy(generator(0, "kept").random(len(eligible)) < 0.5)
    soft = soften(vit, eligible, kept, 0.1)
    masks = eligible.unflatten(kept)
    for name, value in soft.items():
        own, excluded = vit.get_parameter(name).detach(), eligible.masks[name] & ~masks[name]
        assert torch.equal(value[~excluded], own[~excluded])
        torch.testing.assert_close(value[excluded], own[excluded] * 0.1)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_rules_without_images_reach_the_same_density_over_the_same_entries(vit, criterion):
    eligible = eligible_entries(vit)
    scores = score_by_weights(criterion, vit, eligible, seed=0)
    *_, last = calibrate(lambda n, k: scores, eligible, density=0.2, iterations=3, seed=0)
    assert int(last.kept.sum()) == round(0.2 * len(eligible))
    magnitude = score_by_weights("lowest_magnitude", vit, eligible, seed=0)
    kept, out = magnitude[last.kept], magnitude[~last.kept]
    if criterion == "lowest_magnitude":
        assert kept.max() <= out.min()
    if criterion == "highest_magnitude":
        assert kept.min() >= out.max()


def test_eligible_entries_are_those_inside_the_blocks(vit):
    masks = eligible_entries(vit).masks
    assert not {"cls_token", "pos_embed", "norm.weight", "head.weight", "patch_embed.proj.weight"} & masks.keys()
    assert len(masks) == 6 * 12
    inside = sum(p.numel() for name, p in vit.named_parameters() if name.startswith("blocks."))
    assert len(eligible_entries(vit)) == inside - 6 * 96


def test_eligible_can_be_less_than_the_blocks(vit):
    sizes = {which: len(eligible_entries(vit, which)) for which in ("blocks", "attention", "qk", "biases")}
    width, depth = 96, 6
    assert sizes["attention"] == depth * (4 * width**2 + 3 * width)  # the key bias is out
    assert sizes["qk"] == depth * (2 * width**2 + width)
    assert sizes["biases"] == depth * (2 + 1 + 4 + 1 + 2) * width  # qkv without k, proj, fc1, fc2, two norms
    qkv = eligible_entries(vit, "qk").masks["blocks.0.attn.qkv.weight"]
    assert bool(qkv[: 2 * width].all())
    assert not qkv[2 * width :].any()


def test_groups_are_rows_heads_and_tensors(vit):
    eligible = eligible_entries(vit)
    assert grouped(eligible, "entry", 3) is None
    sizes = {kind: grouped(eligible, kind, 3).sizes for kind in ("row", "head", "tensor")}
    for found in sizes.values():
        assert int(found.sum()) == len(eligible)
    tensor_of_q = grouped(eligible, "tensor", 3).of[eligible_position(eligible, "blocks.0.attn.qkv.weight")]
    assert tensor_of_q.unique(return_counts=True)[1].tolist() == [96 * 96] * 3
    head = grouped(eligible, "head", 3).of[eligible_position(eligible, "blocks.0.attn.qkv.weight")]
    assert head.unique(return_counts=True)[1].tolist() == [32 * 96] * 9
    row = grouped(eligible, "row", 3).of[eligible_position(eligible, "blocks.1.mlp.fc2.weight")]
    assert row.unique(return_counts=True)[1].tolist() == [384] * 96
    assert int((sizes["tensor"] > 0).sum()) == 6 * (12 + 2 + 1)  # q, k, v of the weight; of the bias q and v


def eligible_position(eligible, name):
    marks = {n: torch.full(m.shape, n == name) for n, m in eligible.masks.items()}
    return eligible.gather(marks)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 1000))
def test_whole_groups_with_the_lowest_mean_are_kept(size, count_groups, seed):
    rng = generator(seed, "groups")
    of = torch.from_numpy(rng.integers(0, count_groups, size))
    groups = Groups(of, torch.bincount(of, minlength=count_groups))
    alive = torch.from_numpy(rng.random(count_groups) < 0.8)
    before = alive[of]
    if not before.any():
        before[:] = True
    scores = torch.from_numpy(rng.integers(0, 4, size)).float()
    count = int(rng.integers(1, int(before.sum()) + 1))
    kept = keep_lowest_groups(scores, before, count, groups, seed, 1)
    assert not (kept & ~before).any()
    chosen, left = set(of[kept].tolist()), set(of[before & ~kept].tolist())
    assert not chosen & left
    assert int(kept.sum()) <= count or len(chosen) == 1
    assert chosen
    mean = {g: float(scores[of == g].mean()) for g in chosen | left}
    if left:
        assert max(mean[g] for g in chosen) <= min(mean[g] for g in left)
        lowest_left = min(left, key=lambda g: mean[g])
        ties = [g for g in left if mean[g] == mean[lowest_left]]
        assert int(kept.sum()) + max(int((of == g).sum()) for g in ties) > count  # no more would have fitted


@pytest.mark.parametrize("granularity", ["row", "head", "tensor"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_rounds_with_groups_are_monotone_and_near_the_density(vit, criterion, granularity):
    eligible = eligible_entries(vit)
    groups = grouped(eligible, granularity, 3)
    scores = score_by_weights(criterion, vit, eligible, 0, groups)
    before = torch.ones(len(eligible), dtype=torch.bool)
    for iteration in calibrate(lambda n, k: scores, eligible, density=0.2, iterations=3, seed=0, groups=groups):
        assert not (iteration.kept & ~before).any()
        before = iteration.kept
        for group in groups.of.unique()[:50]:
            assert len(before[groups.of == group].unique()) == 1
    largest = float(groups.sizes.max()) / len(eligible)
    assert 0.2 - largest < iteration.density <= 0.2


def test_scores_of_weights_are_magnitudes(vit):
    eligible = eligible_entries(vit)
    magnitude = eligible.gather(named_tensors(vit)).abs()
    assert torch.equal(score_by_weights("lowest_magnitude", vit, eligible, 0), magnitude)
    assert torch.equal(score_by_weights("highest_magnitude", vit, eligible, 0), -magnitude)
