import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.models.vision_transformer import parts
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.editing.controls import magnitude_mask, random_like, random_mask, score_by_weights
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.ranking import Groups, group_entries, keep_lowest, keep_lowest_groups
from fedtalos.training.editing.sensitivity import Holder, Sensitivity, draw_holders, soften
from fedtalos.training.editing.talos import refine, talos_mask
from fedtalos.training.entries import named_tensors
from fedtalos.training.masked_parameters import MaskedParameters

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
    for iteration in refine(score, Eligible(), density=density, iterations=iterations, seed=0):
        assert int(iteration.kept.sum()) == round(density ** (iteration.number / iterations) * 500)
        assert not (iteration.kept & ~before).any()
        assert torch.equal(seen[-1], before)
        before = iteration.kept


def test_design_densities():
    eligible = type("E", (), {"device": torch.device("cpu"), "__len__": lambda self: 10_000})()
    done = refine(lambda n, k: torch.arange(10_000.0), eligible, density=0.1, iterations=4, seed=0)
    assert [int(i.kept.sum()) for i in done] == [5623, 3162, 1778, 1000]


def test_lowest_scores_are_kept_not_the_highest():
    eligible = type("E", (), {"device": torch.device("cpu"), "__len__": lambda self: 10})()
    *_, last = refine(lambda n, k: torch.arange(10.0), eligible, density=0.3, iterations=2, seed=0)
    assert last.kept.nonzero().squeeze(1).tolist() == [0, 1, 2]


def test_resuming_equals_no_interruption(vit):
    eligible = eligible_entries(vit)
    drawn = (torch.from_numpy(generator(i, "s").random(len(eligible))) for i in range(4))
    scores = [scores.float().to(eligible.device) for scores in drawn]

    def run(start=None, stop=4):
        kept = None
        for iteration in refine(
            lambda n, k: scores[n - 1] * k, eligible, density=0.1, iterations=4, seed=3, start=start
        ):
            kept = iteration.kept
            if iteration.number == stop:
                return kept
        return kept

    assert torch.equal(run(), run(start=(2, run(stop=2))))


def test_soften_multiplies_only_excluded_eligible_entries(vit):
    eligible = eligible_entries(vit)
    kept = torch.from_numpy(generator(0, "kept").random(len(eligible)) < 0.5).to(eligible.device)
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
    *_, last = refine(lambda n, k: scores, eligible, density=0.2, iterations=3, seed=0)
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
    assert group_entries(eligible, "entry", vit.architecture) is None
    sizes = {kind: group_entries(eligible, kind, vit.architecture).sizes for kind in ("row", "head", "tensor")}
    for found in sizes.values():
        assert int(found.sum()) == len(eligible)
    tensor_of_q = group_entries(eligible, "tensor", vit.architecture).of[
        eligible_position(eligible, "blocks.0.attn.qkv.weight")
    ]
    assert tensor_of_q.unique(return_counts=True)[1].tolist() == [96 * 96] * 3
    head = group_entries(eligible, "head", vit.architecture).of[eligible_position(eligible, "blocks.0.attn.qkv.weight")]
    assert head.unique(return_counts=True)[1].tolist() == [32 * 96] * 9
    row = group_entries(eligible, "row", vit.architecture).of[eligible_position(eligible, "blocks.1.mlp.fc2.weight")]
    assert row.unique(return_counts=True)[1].tolist() == [384] * 96
    assert int((sizes["tensor"] > 0).sum()) == 6 * (12 + 2 + 1)  # q, k, v of the weight; of the bias q and v


def eligible_position(eligible, name):
    marks = {n: torch.full_like(m, n == name) for n, m in eligible.masks.items()}
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
    groups = group_entries(eligible, granularity, vit.architecture)
    scores = score_by_weights(criterion, vit, eligible, 0, groups)
    before = torch.ones(len(eligible), dtype=torch.bool, device=eligible.device)
    for iteration in refine(lambda n, k: scores, eligible, density=0.2, iterations=3, seed=0, groups=groups):
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


def test_the_papers_eligible_entries_are_what_the_released_code_ranks(vit):
    """iurada/talos-task-arithmetic, vision/layers.py: attention, Linear but the head, Conv2d and LayerNorm layers."""
    blocks, paper = eligible_entries(vit), eligible_entries(vit, "paper")
    outside = {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    assert paper.masks.keys() == blocks.masks.keys() | outside
    assert len(paper) == len(blocks) + sum(vit.get_parameter(name).numel() for name in outside)
    ranked = {
        f"{path}.{name}"
        for path, layer in vit.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.LayerNorm) and path != "head"
        for name, _ in layer.named_parameters(recurse=False)
    }
    assert paper.masks.keys() == ranked


@pytest.fixture
def held(labels) -> LabelledImages:
    """Twelve stored images of 8 px."""
    pixels = torch.randint(0, 256, (12, 3, 8, 8), generator=torch_generator(0, "pixels"), dtype=torch.uint8)
    return LabelledImages(pixels.to(labels.device), labels)


@pytest.fixture
def trained(vit):
    vit.head_source = "ridge"
    return vit


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


def count(mask) -> int:
    return sum(int(tensor.sum()) for tensor in mask.values())


def test_talos_mask_is_the_last_refinement_by_sensitivity(trained, held):
    eligible = eligible_entries(trained)
    mask = talos_mask(trained, held, density=0.2, iterations=3, chunk=5, seed=2)
    holders = draw_holders(held, None, 2)
    assert sorted(holders[0].ids.tolist()) == list(range(12))
    score = Sensitivity(trained, eligible, holders, chunk=5, seed=2)
    *_, last = refine(score, eligible, density=0.2, iterations=3, seed=2)
    assert same(mask, eligible.unflatten(last.kept))
    assert count(mask) == round(0.2 * len(eligible))
    assert same(mask, talos_mask(trained, held, density=0.2, iterations=3, chunk=5, seed=2, criterion="talos"))
    assert not same(mask, talos_mask(trained, held, density=0.2, iterations=3, chunk=5, seed=3))


def test_most_sensitive_is_the_complement_of_least_sensitive(trained, held):
    least = talos_mask(trained, held, density=0.5, iterations=1)
    most = talos_mask(trained, held, density=0.5, iterations=1, criterion="most_sensitive")
    entries = len(eligible_entries(trained))
    both = sum(int((least[name] & most[name]).sum()) for name in least)
    assert both <= 0.001 * entries  # ties, drawn on either side
    assert count(least) == count(most)


@pytest.mark.parametrize("granularity", ["entry", "row", "tensor"])
def test_the_papers_entries_are_softened_in_later_rounds_and_can_be_masked(trained, held, granularity):
    outside = ["patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    mask = talos_mask(trained, held, density=0.5, iterations=2, eligible="paper", granularity=granularity)
    assert set(outside) < mask.keys()
    assert 0 < count(mask) <= round(0.5 * len(eligible_entries(trained, "paper")))
    entries = eligible_entries(trained, "paper")
    weights = soften(trained, entries, torch.zeros(len(entries), dtype=torch.bool, device=entries.device), 0.01)
    for name in outside:
        torch.testing.assert_close(weights[name], 0.01 * trained.get_parameter(name).detach())
    moving = MaskedParameters(
        trained, {"patch_embed.proj.weight": mask["blocks.0.attn.qkv.weight"].new_ones(96, 3, 2, 2)}
    )
    assert moving.frozen_stages == 0


def test_scores_of_holders_add_up_to_those_of_all_images(trained, held):
    eligible = eligible_entries(trained)
    everything = torch.ones(len(eligible), dtype=torch.bool, device=eligible.device)
    apart = [Holder(number, np.arange(number, 12, 3), held) for number in range(3)]
    alone = [Sensitivity(trained, eligible, [holder])(1, everything) for holder in apart]
    together = Sensitivity(trained, eligible, apart)(1, everything)
    assert torch.equal(sum(alone[1:], alone[0]), together)
    pooled = Sensitivity(trained, eligible, [Holder(0, np.arange(12), held)])(1, everything)
    torch.testing.assert_close(together, pooled, rtol=1e-4, atol=1e-6 * float(pooled.max()))
    federated = talos_mask(trained, apart, density=0.1)
    shared = talos_mask(trained, held, density=0.1)
    agree = sum(int((federated[name] & shared[name]).sum()) for name in shared)
    assert agree > 0.999 * count(shared)


def test_max_images_is_shared_among_holders(held):
    apart = [Holder(0, np.arange(6), held), Holder(5, np.arange(6, 12), held)]
    drawn = draw_holders(apart, 4, seed=0)
    assert [(holder.number, len(holder.ids)) for holder in drawn] == [(0, 2), (5, 2)]
    for before, after in zip(apart, drawn, strict=True):
        assert set(after.ids) < set(before.ids)
    assert [len(holder.ids) for holder in draw_holders(apart, 1, seed=0)] == [1, 1]  # each at least one
    assert len(draw_holders(held, 5, seed=0)[0].ids) == 5


def test_watch_sees_shares_that_add_up_to_an_iteration(trained, held):
    eligible, shares = eligible_entries(trained), []

    def watch(batches, share):
        for batch in batches:
            shares.append(share)
            yield batch

    holders = [Holder(0, np.arange(7), held), Holder(1, np.arange(7, 12), held)]
    score = Sensitivity(trained, eligible, holders, batch_size=3, watch=watch)
    score(1, torch.ones(len(eligible), dtype=torch.bool, device=eligible.device))
    assert shares == [1 / 5] * 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"density": 1e-9}, "density 1e-09 .*leaves none of"),
        ({"density": 0.0}, "density 0.0: expected"),
        ({"density": 1.5}, "density 1.5: expected"),
        ({"iterations": 0}, "iterations 0: expected at least 1"),
        ({"criterion": "random"}, "criterion 'random'.*random_mask"),
        ({"eligible": "head"}, "eligible 'head': expected"),
        ({"granularity": "layer"}, "granularity 'layer': expected"),
        ({"soft_zero": 0.0}, "soft_zero 0.0: expected"),
        ({"fisher": "false"}, "fisher 'false': expected"),
        ({"fisher_samples": 0}, "fisher_samples 0: expected at least 1"),
        ({"chunk": 0}, "chunk 0: expected at least 1"),
        ({"max_images": 0}, "max_images 0: expected at least 1"),
    ],
)
def test_talos_mask_refuses_values_outside_their_limits(trained, held, changes, says):
    with pytest.raises(InputError, match=says):
        talos_mask(trained, held, **changes)


def test_talos_mask_refuses_an_untrained_head_and_no_images(vit, held):
    with pytest.raises(InputError, match="head random: scores through an untrained head would mean nothing"):
        talos_mask(vit, held)
    vit.head_source = "weights"
    for images in (held.slice(0, 0), [], [Holder(0, np.arange(3), held), Holder(1, np.arange(0), held)]):
        with pytest.raises(InputError, match="images: expected at least one"):
            talos_mask(vit, images)


def test_controls_are_as_dense_and_keep_what_they_say(vit):
    eligible = eligible_entries(vit)
    magnitude = eligible.gather(named_tensors(vit)).abs()
    drawn, large, small = random_mask(vit, 0.2), magnitude_mask(vit, 0.2), magnitude_mask(vit, 0.2, largest=False)
    for mask in (drawn, large, small):
        assert count(mask) == round(0.2 * len(eligible))
        assert mask.keys() == eligible.masks.keys()
    kept = {
        kind: eligible.gather({name: tensor.to(eligible.device) for name, tensor in mask.items()})
        for kind, mask in (("large", large), ("small", small))
    }
    assert magnitude[kept["large"]].min() >= magnitude[~kept["large"]].max()
    assert magnitude[kept["small"]].max() <= magnitude[~kept["small"]].min()
    assert same(drawn, random_mask(vit, 0.2))
    assert not same(drawn, random_mask(vit, 0.2, seed=1))
    assert count(random_mask(vit, 0.5, eligible="qk")) == round(0.5 * len(eligible_entries(vit, "qk")))
    with pytest.raises(InputError, match="leaves none"):
        random_mask(vit, 1e-9)


def all_parts(mask):
    return [part for name in sorted(mask) for part in parts(name, mask[name]).values()]


def assert_near(found: int, expected: float):
    assert abs(found - expected) <= 5 * expected**0.5


@pytest.mark.parametrize("rule", ["blocks", "qk"])
def test_a_random_mask_like_another_is_as_dense_over_eligible_entries_only(vit, rule):
    mask = magnitude_mask(vit, 0.6, eligible=rule)
    eligible = {name: tensor.cpu() for name, tensor in eligible_entries(vit, rule).masks.items()}
    per_tensor, anywhere = (random_like(mask, rule, scope=scope) for scope in ("tensor", "global"))
    for drawn in (per_tensor, anywhere):
        assert not any(bool((drawn[name] & ~eligible[name]).any()) for name in drawn)
        assert count(drawn) == count(mask)
    assert [int(part.sum()) for part in all_parts(per_tensor)] == [int(part.sum()) for part in all_parts(mask)]
    assert [int(t.sum()) for t in anywhere.values()] != [int(t.sum()) for t in mask.values()]
    for name, tensor in anywhere.items():
        assert_near(int(tensor.sum()), 0.6 * int(eligible[name].sum()))
    for drawn, like_it, place in zip(*map(all_parts, (per_tensor, mask, eligible)), strict=True):
        by_chance = int(like_it.sum()) ** 2 / max(1, int(place.sum()))
        assert_near(int((drawn & like_it).sum()), by_chance)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_seed_fixes_the_random_mask_like_another(vit, scope):
    mask = magnitude_mask(vit, 0.6)
    assert same(random_like(mask, scope=scope), random_like(mask, scope=scope))
    assert not same(random_like(mask, scope=scope), random_like(mask, scope=scope, seed=1))


def test_a_mask_of_other_than_eligible_entries_is_like_none(vit):
    mask = {name: ~tensor.cpu() for name, tensor in eligible_entries(vit).masks.items()}
    with pytest.raises(InputError, match=r"mask: lets entries of blocks.0.attn.qkv.bias move that are not eligible"):
        random_like(mask)
