"""`fedtalos mask` through the real command line, and mask files in a notebook: what joining and comparing must keep."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtalos.app.figures import draw as plots
from fedtalos.cli import main
from fedtalos.errors import InputError
from fedtalos.models.load import build_model
from fedtalos.models.vision_transformer import Architecture
from fedtalos.training.editing.combine import chance_overlap, combine_masks, overlap
from fedtalos.training.editing.controls import magnitude_mask, random_mask
from fedtalos.training.editing.describe import OUTSIDE, density_table, describe_facts
from fedtalos.training.editing.mask_facts import SEVERAL, fingerprint
from fedtalos.training.editing.mask_file import load_mask, read_mask_file, save_mask

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
    monkeypatch.setattr(plots, "plot_masks", lambda *_: [])


def load(name: str):
    return read_mask_file(Path("masks", f"{name}.safetensors"))


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
    changed = {"criterion": None, "made_from": None}
    assert asdict(facts) | changed == asdict(before) | changed
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


def overlaps(out: str) -> np.ndarray:
    lines = out[out.index("Overlap") : out.index("Made differently")].splitlines()[2:]
    return np.array([[float(cell) for cell in re.sub(r"\(.*?\)", "", line).split()[1:]] for line in lines])


def test_beside_each_overlap_is_what_chance_gives(capsys, undrawn):
    main(["mask", "compare", *THREE])
    out = capsys.readouterr().out
    lines = out[out.index("Overlap") : out.index("Made differently")].splitlines()[2:]
    masks = [load(name)[0] for name in ("random", "low", "high")]
    for at, line in enumerate(lines):
        said = [float(share) for share in re.findall(r"\((.*?)\)", line)]
        others = [mask for other, mask in enumerate(masks) if other != at]
        assert said == pytest.approx([chance_overlap(masks[at], other) for other in others], abs=6e-3)
    assert max(map(len, lines)) <= 80


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


def model_of(seed: int = 0, patch_size: int = 4):
    return build_model(Architecture("micro", 8, patch_size, 10), seed)


def test_a_mask_saved_with_its_model_comes_back_for_that_model_only():
    model = model_of()
    mask = random_mask(model, 0.3)
    save_mask("mine.safetensors", mask, model, criterion="by chance")
    assert same(load_mask("mine.safetensors", model), mask)
    with pytest.raises(InputError, match=r"not made for this: weights none, seed 0.* / none, seed 1"):
        load_mask("mine.safetensors", model_of(seed=1))
    assert same(load_mask("mine.safetensors", model_of(seed=1), force_mask=True), mask)
    with pytest.raises(InputError, match="not made for this: patch_size 4 / 2"):
        load_mask("mine.safetensors", model_of(patch_size=2))
    with pytest.raises(InputError, match="no such file"):
        load_mask("nowhere.safetensors", model)
    words = describe_facts(read_mask_file(Path("mine.safetensors"))[1])
    assert (words["criterion"], words["density"], words["seed"]) == ("by chance", "30 %", "unknown")


def test_a_mask_of_the_papers_entries_shows_them_apart(capsys):
    model = model_of()
    mask = random_mask(model, 0.5, eligible="paper")
    table = density_table(mask, "paper")
    outside = {row.kind: row.entries for row in table if row.block == OUTSIDE}
    assert outside == {"conv": 96 * 3 * 4 * 4, "norms": 2 * 96, "biases": 96}
    assert [row.place for row in table if row.block == OUTSIDE] == ["-"] * 3
    inside = density_table({name: tensor for name, tensor in mask.items() if name.startswith("blocks.")})
    assert [row for row in table if row.block != OUTSIDE] == inside
    save_mask("mine.safetensors", mask, model)
    main(["mask", "show", "mine.safetensors"])
    shown = capsys.readouterr().out
    assert any(line.split("│")[1].strip() == "-" for line in shown.splitlines() if line.count("│") > 2)
    conv = {"patch_embed.proj.weight": mask["patch_embed.proj.weight"]}  # less than all of them
    save_mask("conv.safetensors", conv, model)
    assert same(load_mask("conv.safetensors", model), conv)


@pytest.mark.parametrize("which", ["blocks", "attention", "qk", "biases", "paper"])
def test_a_saved_mask_says_what_it_chose_from(which):
    model = model_of()
    mask = random_mask(model, 0.5, eligible=which)
    save_mask("mine.safetensors", mask, model)
    facts = read_mask_file(Path("mine.safetensors"))[1]
    assert facts.eligible_in == which
    assert facts.density == pytest.approx(0.5, abs=1e-3)


def test_what_is_no_mask_of_the_model_is_not_saved():
    model = model_of()
    mask = random_mask(model, 0.5)
    name = "blocks.0.mlp.fc1.weight"
    wrong = [
        mask | {"head.weight": torch.ones(10, 96, dtype=torch.bool)},
        mask | {name: mask[name].T},
        {name: torch.ones_like(tensor) for name, tensor in mask.items()},  # the key biases too
        {name: torch.zeros_like(mask[name])},
    ]
    for other in wrong:
        with pytest.raises(InputError, match=r"^mask: "):
            save_mask("mine.safetensors", other, model)
    with pytest.raises(InputError, match="plain words"):
        save_mask("mine.safetensors", mask, model, criterion="\x1b[31m")
    assert not Path("mine.safetensors").exists()
    save_mask("mine.safetensors", {name: mask[name]}, model)  # less than all tensors is a mask
    assert load_mask("mine.safetensors", model).keys() == {name}


def test_masks_are_combined_in_a_notebook():
    model = model_of()
    one, two = magnitude_mask(model, 0.3), magnitude_mask(model, 0.7, largest=False)
    union = combine_masks([one, two])
    assert overlap(union, one) == pytest.approx(0.3, abs=1e-3)
    with pytest.raises(InputError, match="no entry may move in 2 of the 2 masks; take rule union"):
        combine_masks([one, two], "intersection")
    for rule, says in (("all", "rule 'all': expected one of union"), ("vote", "quorum 2")):
        with pytest.raises(InputError, match=says):
            combine_masks([one, two], rule, 2)
    with pytest.raises(InputError, match="different models"):
        combine_masks([one, random_mask(model, 0.3, eligible="qk")])
    with pytest.raises(InputError, match="at least one"):
        combine_masks([])
