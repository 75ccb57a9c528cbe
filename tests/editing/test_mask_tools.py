"""`fedtalos mask` through the real command line: what joining, drawing and comparing must keep."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtalos.app.figures import draw as plots
from fedtalos.cli import main
from fedtalos.experiments import mask as mask_tools
from fedtalos.models.vision_transformer import Architecture, VisionTransformer, parts
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.describe import SEVERAL
from fedtalos.training.editing.mask_file import fingerprint, load_mask
from fedtalos.training.editing.talos import eligible_entries

SCRATCH = "editing --dataset digits --model_size micro --image_size 8 --patch_size 4 --eval_limit 40 --weights none"
MADE = {
    "random": "--criterion random --target_sparsity 0.6",
    "low": "--criterion lowest_magnitude --target_sparsity 0.4",
    "high": "--criterion highest_magnitude --target_sparsity 0.4",
    "qk": "--criterion lowest_magnitude --target_sparsity 0.7 --eligible qk",
    "elsewhere": "--criterion random --target_sparsity 0.6 --seed 1",
}
THREE = [f"masks/{name}.safetensors" for name in ("random", "low", "high")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Masks of one model; all but the last of the same weights."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(plots, "plot_masks", lambda *_: [])
        patched.setattr(plots, "plot_iterations", lambda *_: [])
        for name, options in MADE.items():
            main([*SCRATCH.split(), *options.split(), "--head", "random", "--num_iterations", "1", "--run_name", name])
    return folder


@pytest.fixture(autouse=True)
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made / "masks", tmp_path / "masks")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(mask_tools, "plot_masks", lambda *_: [])


def load(name: str):
    return load_mask(Path("masks", f"{name}.safetensors"))


def combine(name: str, files: list[str], *options: str):
    main(["mask", "combine", *files, "--name", name, *options])
    mask, facts = load(name)
    assert facts.active == sum(int(tensor.sum()) for tensor in mask.values())
    return mask, facts


def same(first, second) -> bool:
    return fingerprint(first) == fingerprint(second)


def within(first, second) -> bool:
    return all(bool((second[name] | ~first[name]).all()) for name in first)


@pytest.mark.parametrize("rule", ["union", "intersection", "majority", "vote"])
def test_joined_with_itself_a_mask_is_itself(rule):
    joined, facts = combine("joined", ["masks/low.safetensors"] * 3, "--rule", rule)
    mask, before = load("low")
    assert same(joined, mask)
    changed = {"criterion", "made_from"}
    assert facts.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert facts.criterion.endswith("of 3 masks (lowest_magnitude)")
    assert facts.made_from == (fingerprint(mask),) * 3


def test_rules_count_votes():
    masks = [load(name)[0] for name in ("random", "low", "high")]
    votes = {name: sum(mask[name].int() for mask in masks) for name in masks[0]}
    union, _ = combine("union", THREE)
    majority, facts = combine("majority", THREE, "--rule", "majority")
    every, _ = combine("intersection", THREE, "--rule", "intersection")
    for joined, needed in ((union, 1), (majority, 2), (every, 3)):
        assert same(joined, {name: count >= needed for name, count in votes.items()})
    assert all(within(every, mask) and within(mask, union) for mask in masks)
    assert same(combine("vote", THREE, "--rule", "vote", "--quorum", "1")[0], every)
    assert same(combine("third", THREE, "--rule", "vote", "--quorum", "0.34")[0], majority)
    assert facts.criterion == "majority of 3 masks (highest_magnitude, lowest_magnitude, random)"


def test_a_header_says_in_what_the_joined_masks_differ(capsys, undrawn):
    _, facts = combine("joined", ["masks/random.safetensors", "masks/elsewhere.safetensors"], "--force")
    (_, one), (_, two) = load("random"), load("elsewhere")
    assert one.weights != two.weights
    assert facts.weights == SEVERAL
    assert (facts.eligible, facts.model, facts.data) == (one.eligible, one.model, one.data)
    capsys.readouterr()
    main(["mask", "show", "masks/joined.safetensors"])
    words = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert words["seed"].split() == words["weights"].split() == [SEVERAL]
    assert words["criterion"].strip() == "union of 2 masks (random)"


def assert_near(count: int, expected: float):
    assert abs(count - expected) <= 5 * expected**0.5


def all_parts(mask):
    return [part for name in sorted(mask) for part in parts(name, mask[name]).values()]


@pytest.mark.parametrize("like", ["low", "qk"])
def test_a_random_mask_is_as_dense_over_eligible_entries_only(like):
    mask, facts = load(like)
    for scope in ("tensor", "global"):
        main(["mask", "random", f"masks/{like}.safetensors", "--scope", scope, "--name", scope])
    per_tensor, drawn_facts = load("tensor")
    anywhere, _ = load("global")
    vit = VisionTransformer(Architecture("micro", 8, 4, 10), torch_generator(0))
    eligible = eligible_entries(vit, facts.eligible_in).masks
    assert within(per_tensor, eligible)
    assert within(anywhere, eligible)
    counts = {name: int(tensor.sum()) for name, tensor in mask.items()}
    assert [int(part.sum()) for part in all_parts(per_tensor)] == [int(part.sum()) for part in all_parts(mask)]
    assert {name: int(tensor.sum()) for name, tensor in anywhere.items()} != counts
    assert sum(int(tensor.sum()) for tensor in anywhere.values()) == facts.active
    for name, tensor in anywhere.items():
        entries = int(eligible[name].sum())
        assert_near(int(tensor.sum()), facts.density * entries)
    for drawn, like_it, place in zip(*map(all_parts, (per_tensor, mask, eligible)), strict=True):
        by_chance = int(like_it.sum()) ** 2 / max(1, int(place.sum()))
        assert_near(int((drawn & like_it).sum()), by_chance)
    assert (drawn_facts.density, drawn_facts.weights) == (facts.density, facts.weights)
    assert (drawn_facts.criterion, drawn_facts.made_from) == ("random, per tensor", (fingerprint(mask),))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_seed_fixes_the_random_mask(scope):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["mask", "random", "masks/low.safetensors", "--scope", scope, "--seed", seed, "--name", name])
    assert Path("masks/a.safetensors").read_bytes() == Path("masks/b.safetensors").read_bytes()
    assert not same(load("a")[0], load("c")[0])


def overlaps(out: str) -> np.ndarray:
    lines = out[out.index("Overlap") : out.index("Made differently")].splitlines()[2:]
    return np.array([[float(cell) for cell in line.split()[1:]] for line in lines])


def test_overlap_is_symmetric_and_one_with_itself(capsys, undrawn):
    main(["mask", "compare", *THREE])
    out = capsys.readouterr().out
    shares = overlaps(out)
    masks = [load(name)[0] for name in ("random", "low", "high")]
    flat = [torch.cat([tensor.flatten() for tensor in mask.values()]) for mask in masks]
    expected = [[int((a & b).sum()) / int((a | b).sum()) for b in flat] for a in flat]
    assert np.array_equal(shares, shares.T)
    assert np.array_equal(np.diag(shares), np.ones(3))
    assert shares == pytest.approx(np.array(expected), abs=6e-3)
    assert "random (1); lowest_magnitude (2); highest_magnitude (3)" in " ".join(out.split())
    assert "weights" not in out  # in these they do not differ


def test_masks_of_other_weights_can_be_compared_and_twins_differ_in_nothing(capsys, undrawn):
    main(["mask", "compare", "masks/random.safetensors", "masks/elsewhere.safetensors"])
    assert "none, seed 0, micro/4 at 8 px (1); none, seed 1, micro/4 at 8 px (2)" in " ".join(
        capsys.readouterr().out.split()
    )
    shutil.copy("masks/low.safetensors", "twin.safetensors")
    main(["mask", "compare", "masks/low.safetensors", "twin.safetensors"])
    out = capsys.readouterr().out
    assert np.array_equal(overlaps(out), np.ones((2, 2)))
    assert "nothing" in out


def test_show_and_compare_draw_and_say_where(capsys):
    main(["mask", "show", "masks/low.safetensors"])
    shown = capsys.readouterr().out
    assert "lowest_magnitude" in shown
    assert fingerprint(load("low")[0]) in shown
    main(["mask", "compare", *THREE[:2], "--name", "pair", "--output_dir", "out"])
    compared = capsys.readouterr().out
    drawn = [f"out/plots/pair/{name}.png" for name in ("random_density", "low_density", "overlap")]
    assert compared.splitlines()[-3:] == drawn
    assert shown.splitlines()[-1] == "plots/low/low_density.png"
    assert all(Path(path).stat().st_size > 5000 for path in [*drawn, "plots/low/low_density.png"])


def test_a_folder_with_brackets_is_printed_as_it_is(capsys, undrawn):
    shutil.copytree("masks", "[red]masks")
    main(["mask", "show", "[red]masks/low.safetensors"])
    main(["mask", "combine", *THREE, "--name", "[bold]", "--output_dir", "[red]"])
    out = capsys.readouterr().out
    assert "[red]masks/low.safetensors" in out
    assert "[red]/masks/[bold].safetensors" in out


@pytest.mark.usefixtures("without_figures")
def test_a_joined_mask_trains_and_one_of_several_weights_wants_force(capsys):
    train = "centralized --dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none"
    train += " --train_limit 40 --eval_limit 20 --num_epochs 1"
    combine("joined", THREE)
    main([*train.split(), "--mask", "masks/joined.safetensors", "--run_name", "sparse"])
    combine("mixed", ["masks/random.safetensors", "masks/elsewhere.safetensors"], "--force")
    with pytest.raises(SystemExit) as stop:
        main([*train.split(), "--mask", "masks/mixed.safetensors", "--run_name", "mixed"])
    assert stop.value.code == 2
    assert "not made for this: weights several / none, seed 0" in capsys.readouterr().err
