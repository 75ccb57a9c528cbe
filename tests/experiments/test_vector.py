"""`fedtalos vector` through the real command line, on embedded digits."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SMALL, interrupt_after, refused

import fedtalos as ft
from fedtalos.app.figures import draw
from fedtalos.app.figures import vectors as figures
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.cli import main
from fedtalos.training.loading import load_trained

FROM = [*SMALL[: SMALL.index("--model_size")], *SMALL[SMALL.index("--device") :], "--weights", "pre"]
FEDERATED = ["federated", *FROM, "--head", "ridge", "--num_clients", "3", "--client_fraction", "1", "--num_rounds", "2"]
FEDERATED += ["--learning_rate", "1e-2", "--batch_size", "16", "--eval_every", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, `pre`; runs from it that keep their vectors, with a `frozen` head and a `moved` one; and a `stranger`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(draw, "plot_run", lambda *_: [])
        main(["centralized", *SMALL, "--num_epochs", "1", "--run_name", "pre"])
        main([*FEDERATED, "--freeze_head", "--save_vector", "--run_name", "frozen"])
        main([*FEDERATED, "--save_vector", "--run_name", "moved"])
    tau = ft.load_vector(folder / "vectors/frozen.safetensors")
    kept = torch.arange(len(tau)) % 3 > 0
    mask = tau.entries.unflatten(kept)
    for name, factor in (("part", 0.5), ("other", -0.2)):
        part = replace(tau, mask=mask, values=factor * tau.values[kept])
        ft.save_vector(folder / f"vectors/{name}.safetensors", part)
    ft.save_vector(folder / "vectors/stranger.safetensors", replace(tau, facts=replace(tau.facts, weights="others")))
    pre = load_checkpoint(folder / "checkpoints/pre/last.json")
    facts = {name: fact for name, fact in pre.facts.items() if name not in ("seal", "format", "file", "sha256")}
    others = {name: tensor + 1 for name, tensor in pre.tensors.items() if "/" not in name}
    save_checkpoint(folder / "checkpoints/stranger", "last", 0, others, facts)
    (folder / "broken.safetensors").write_bytes(b"x" * 100)
    return folder


@pytest.fixture
def there(made, monkeypatch):
    """The working directory is the folder itself, to be left as it is."""
    monkeypatch.chdir(made)


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """The working directory is a copy."""
    for part in ("vectors", "checkpoints", "results"):
        shutil.copytree(made / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)


def tensors(run):
    return {
        name: t for name, t in load_checkpoint(Path("checkpoints", run, "last.json")).tensors.items() if "/" not in name
    }


def close(first, second):
    """Equal to the rounding of a sum or two."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("run", ["frozen", "moved"])
def test_a_run_is_its_base_plus_its_vector(run, here, capsys):
    """The base's head, fitted before the run, comes from the vector's file."""
    main(["vector", "apply", "pre", f"vectors/{run}.safetensors", "--name", "again"])
    close(tensors("again"), tensors(run))
    capsys.readouterr()
    for name in ("again", run):
        main(["evaluate", name, "--eval_limit", "20"])
    first, second = re.findall(r"\((\d+) of 20\)", capsys.readouterr().out)
    assert first == second
    assert ("head.weight" in ft.load_vector(f"vectors/{run}.safetensors").mask) == (run == "moved")


@pytest.mark.parametrize("run", ["frozen", "moved"])
def test_a_run_that_kept_none_has_its_start_rebuilt(run, here):
    main(["vector", "make", run, "--name", "rebuilt"])
    assert Path("vectors/rebuilt.safetensors").read_bytes() == Path(f"vectors/{run}.safetensors").read_bytes()


def test_a_stopped_run_writes_the_vector_that_it_would_have_written(here, monkeypatch, without_figures):
    command = [*FEDERATED, "--save_vector", "--run_name", "stopped"]
    with monkeypatch.context() as patched:
        interrupt_after(patched, 4)
        with pytest.raises(SystemExit):
            main(command)
    assert not Path("vectors/stopped.safetensors").exists()
    main(["federated", "--resume", "--run_name", "stopped"])
    stopped, moved = (ft.load_vector(f"vectors/{run}.safetensors") for run in ("stopped", "moved"))
    assert stopped.fingerprint == moved.fingerprint
    assert stopped.facts.head == moved.facts.head


def test_a_pruned_start_is_no_base_that_anybody_has(here, capsys, without_figures):
    """Its vector leads from weights with zeros; added to those without, it gives another model than was trained."""
    main(["editing", *FROM, "--criterion", "random", "--target_sparsity", "0.5", "--run_name", "m"])
    pruned = ["--mask", "masks/m.safetensors", "--mask_mode", "prune", "--num_rounds", "1", "--save_vector"]
    main([*FEDERATED, *pruned, "--run_name", "pruned"])
    main(["vector", "make", "pruned", "--name", "again"])
    close(*(ft.load_vector(Path(f"vectors/{name}.safetensors")).tensors() for name in ("pruned", "again")))
    apply = ["vector", "apply", "pre", "vectors/again.safetensors", "--name", "sum"]
    assert "not made on this model: weights" in refused(apply, capsys)
    main(["pruned" if word == "pre" else word for word in apply])  # what it came to can go on from there


def test_one_checkpoint_less_another(here):
    main(["vector", "make", "frozen", "--before", "pre", "--name", "less"])
    less, own = (ft.load_vector(f"vectors/{name}.safetensors") for name in ("less", "frozen"))
    assert less.facts.weights == own.facts.weights
    assert "head.weight" in less.mask  # the ridge head is another than the base's own
    main(["vector", "apply", "pre", "vectors/less.safetensors", "--name", "again"])
    close(tensors("again"), tensors("frozen"))


def test_negated_and_added_to_the_run_it_gives_the_base_back(here, capsys):
    main(["vector", "negate", "vectors/frozen.safetensors", "--name", "minus"])
    main(["vector", "apply", "frozen", "vectors/minus.safetensors", "--name", "back"])
    assert "added to what it came to" in capsys.readouterr().out
    back, pre = tensors("back"), tensors("pre")
    close({n: t for n, t in back.items() if "head" not in n}, {n: t for n, t in pre.items() if "head" not in n})
    model, _ = load_trained("checkpoints/back")
    assert (
        ft.load_vector("vectors/frozen.safetensors").facts.head
        == ft.load_vector("vectors/minus.safetensors").facts.head
    )
    main(["vector", "apply", "back", "vectors/frozen.safetensors", "--name", "forth", "--alpha", "1"])
    close(tensors("forth"), tensors("frozen"))
    assert model.architecture.num_classes == 10


def test_an_edited_checkpoint_is_a_start_for_runs(here, without_figures):
    main(["vector", "apply", "pre", "vectors/frozen.safetensors", "--alpha", "0.5", "--name", "half"])
    main(["centralized", *FROM, "--weights", "half", "--num_epochs", "1", "--run_name", "on"])
    assert Path("results/on/summary.yaml").exists()


def test_merging_writes_what_the_library_gives(here):
    files = [f"vectors/{name}.safetensors" for name in ("frozen", "part", "other")]
    vectors = [ft.load_vector(file) for file in files]
    for method in ("mean", "consensus", "dare"):
        main(["vector", "merge", *files, "--method", method, "--name", method])
        found, expected = ft.load_vector(f"vectors/{method}.safetensors"), ft.merge(vectors, method)
        assert found.fingerprint == expected.fingerprint
        assert found.facts.command == expected.facts.command
        assert found.facts.made_from
    main(["vector", "merge", *files, "--method", "ties", "--share", "0.5", "--alpha", "0.3", "--name", "less"])
    assert torch.equal(
        ft.load_vector("vectors/less.safetensors").values, (0.3 * ft.merge(vectors, "ties", share=0.5)).values
    )


def test_alpha_by_validation_never_falls_below_the_base(here, capsys):
    main(["vector", "merge", "vectors/frozen.safetensors", "--alpha", "auto", "--base", "pre", "--name", "m"])
    said = capsys.readouterr().out
    tried = {
        float(a): float(v) for a, v in re.findall(r"([\d.]+): ([\d.]+)", said.split("by alpha:")[1].splitlines()[0])
    }
    alpha = float(re.search(r"^alpha ([\d.]+)$", said, re.MULTILINE)[1])
    assert tried[alpha] == max(tried.values()) >= tried[0.0]
    found, own = (ft.load_vector(f"vectors/{name}.safetensors") for name in ("m", "frozen"))
    assert torch.equal(found.values, (own.values.double() * alpha).float())


def test_applied_by_validation_it_is_the_factor_that_merging_finds(here, capsys):
    main(["vector", "apply", "pre", "vectors/frozen.safetensors", "--alpha", "auto", "--name", "edited"])
    alpha = float(re.search(r"^alpha ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)[1])
    main(["vector", "apply", "pre", "vectors/frozen.safetensors", "--alpha", f"{alpha:g}", "--name", "same"])
    edited, same = (
        ft.load_trained(Path("checkpoints", name, "last.json"), device="cpu")[0] for name in ("edited", "same")
    )
    assert all(torch.equal(first, second) for first, second in zip(edited.parameters(), same.parameters(), strict=True))


@pytest.mark.draws
def test_show_prints_and_draws(here, capsys):
    main(["vector", "show", "vectors/frozen.safetensors", "vectors/moved.safetensors", "--base", "pre"])
    said = capsys.readouterr().out
    words = ("federated frozen", "moves %", "Cosines, in brackets the overlap of supports", "fc1", "head")
    assert all(word in said for word in words)
    drawn = Path("plots/frozen-vs-moved")
    assert {path.name for path in drawn.iterdir()} == {
        "frozen_norms.png",
        "moved_norms.png",
        "cosines.png",
        "disentanglement.png",
    }


def test_disentanglement_is_drawn():
    figure = figures.disentanglement([0.0, 1.0], torch.tensor([[0.0, 0.1], [0.2, 1.0]]).numpy(), "cats", "dogs")
    assert figure.axes[0].get_xlabel() == "alpha of dogs"


V, M, S = (f"vectors/{name}.safetensors" for name in ("frozen", "moved", "stranger"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "expected a vector command"),
        ("mak frozen", "no vector command 'mak'"),
        ("make nobody", "no nobody/last.json"),
        ("make frozen", "exists: move it away"),
        ("make frozen --before nobody --name n", "no nobody/last.json"),
        ("make pre --before pre --name n", "are the same"),
        ("make checkpoints/frozen/last.json --which best --name n", "--which best"),
        ("show", r"expected VECTOR... \(vector files"),
        ("show nothing.safetensors", "no such file"),
        (f"show {V} {V}", "its own name"),
        (f"show {V} {S}", "different bases"),
        ("show broken.safetensors", "not a readable fedtalos vector"),
        (f"show {V} --name a/b", "without slashes"),
        (f"show {V} --base pre", "give two"),
        (f"show {V} --eval_limit 5", "is of --base"),
        (f"apply pre {S} --name n", "not made on this model: weights"),
        (f"apply stranger {V} --name n", "not made on this model: weights"),
        (f"apply pre {V} {S} --name n", "different bases"),
        (f"apply nobody {V} --name n", "nobody"),
        (f"apply pre {V} --name n --alpha nan", "alpha"),
        (f"apply pre {V} --name n --alpha inf", "alpha"),
        (f"apply pre {V} --name n --alpha much", "alpha"),
        (f"apply pre {V} --name n --eval_limit 5", "is of --alpha auto"),
        (f"apply pre {V} --name frozen", "exists: move it away"),
        ("apply pre --name n", r"expected VECTOR... \(vector files"),
        (f"negate {V} --name frozen", "exists: move it away"),
        (f"merge {V} {S} --name n", "different bases"),
        (f"merge {V} --name n --method average", "method"),
        (f"merge {V} --name n --method fisher", "federated --merge fisher"),
        (f"merge {V} --name n --share 0.5", "is of --method ties"),
        (f"merge {V} --name n --method ties --share 0", "share"),
        (f"merge {V} --name n --method consensus --votes 2", "votes"),
        (f"merge {V} --name n --alpha auto", "--base"),
        (f"merge {V} --name n --base pre", "is of --alpha auto"),
        (f"merge {V} --name n --alpha auto --base stranger", "not made on this model"),
        (f"merge {V} --name n --alpha auto --base pre --dataset folder --data_dir nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(command, says, there, capsys):
    before = sorted(Path().rglob("*"))
    said = refused(["vector", *command.split()], capsys)
    assert re.search(says, said), said
    assert sorted(Path().rglob("*")) == before


def test_a_vector_that_is_there_is_not_overwritten_by_a_run(here, capsys):
    shutil.move("vectors/frozen.safetensors", "vectors/new.safetensors")
    says = refused([*FEDERATED, "--save_vector", "--run_name", "new"], capsys)
    assert "exists, of an earlier run" in says
    assert not Path("results/new").exists()


def test_vectors_of_other_classes_are_refused(here, capsys):
    tau = ft.load_vector(V)
    other = replace(tau, facts=replace(tau.facts, classes=tuple(f"class {number}" for number in range(10))))
    ft.save_vector("vectors/other.safetensors", other)
    assert "different classes" in refused(
        ["vector", "apply", "pre", V, "vectors/other.safetensors", "--name", "n"], capsys
    )
    assert "class" in refused(["vector", "apply", "frozen", "vectors/other.safetensors", "--name", "n"], capsys)


def test_a_figure_leaves_out_what_would_run_into_each_other():
    few, many = (figures.cosine_matrix(["name"] * count, np.eye(count)) for count in (5, 20))
    assert len(few.axes[0].texts) == 25
    assert not many.axes[0].texts
    axes = figures.disentanglement((0.0, 1.0), np.eye(2), "n" * 200, "m" * 200).axes[0]
    assert max(len(axes.get_xlabel()), len(axes.get_ylabel())) < 60
