"""What plot and evaluate take, as people name it: runs by any of their folders, sweeps, weights."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import CENTRALIZED, SMALL, refused
from safetensors.torch import load_file, save_file

from fedtalos.app.figures.draw import name_together, plot_comparison
from fedtalos.app.sweep.grid import Grid, expand
from fedtalos.app.sweep.plots import check_data
from fedtalos.cli import main
from fedtalos.errors import InputError

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


def made_run(name: str, **config: object) -> Path:
    """Records of a run, as far as figures read them."""
    folder = Path("results", name)
    folder.mkdir(parents=True)
    rows = ["epoch,split,loss,accuracy,examples,learning_rate,bytes_down,bytes_up,seconds"]
    rows += [f"{epoch},val,1.5,0.5,10,,0,0,1" for epoch in range(1, 5)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump({"command": "centralized", **config}))
    return folder


# evaluate


@pytest.fixture
def accuracy(capsys, in_a_folder_of_its_own, without_figures) -> str:
    """What evaluate says of the run `a`."""
    main([*CENTRALIZED, "--run_name", "a"])
    capsys.readouterr()
    main(["evaluate", "a"])
    return capsys.readouterr().out.partition("accuracy ")[2]


@pytest.mark.parametrize(
    "words",
    [
        "a",
        "a/last.json",
        "checkpoints/a",
        "checkpoints/a/",
        "checkpoints/a/last.json",
        "results/a",
        "./results/a/",
        "checkpoints/a/last-000001.safetensors",
    ],
)
def test_a_run_is_found_by_any_of_its_names(words, accuracy, capsys):
    main(["evaluate", words])
    assert capsys.readouterr().out.partition("accuracy ")[2] == accuracy
    main(["evaluate", words, "--output_dir", "."])
    shutil.copytree(".", "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    if "/" not in words or words.startswith("a/"):
        main(["evaluate", words, "--output_dir", "elsewhere"])
    else:
        main(["evaluate", f"elsewhere/{words}"])
    assert capsys.readouterr().out.rstrip().rpartition("accuracy ")[2] == accuracy.rstrip()


@pytest.mark.parametrize("ending", ["safetensors", "pth", "bin"])
def test_weights_need_a_data_set_of_their_classes(ending, accuracy, capsys):
    tensors = load_file(next(Path("checkpoints/a").glob("last-*")))
    tensors = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    path = f"mine.{ending}"
    (save_file if ending == "safetensors" else torch.save)(tensors, path)
    assert f"evaluate {path}: weights alone" in (says := refused(["evaluate", path], capsys))
    assert "--dataset" in says
    arguments = ["evaluate", path, "--dataset", "digits", "--eval_limit", "20", "--device", "cpu"]
    main(arguments)
    assert capsys.readouterr().out.rstrip().endswith(" of 20)")
    tensors["head.weight"], tensors["head.bias"] = torch.zeros(7, 96), torch.zeros(7)
    save_file(tensors, "other.safetensors")
    assert "no head for these classes" in refused(["evaluate", "other.safetensors", *arguments[2:]], capsys)


def test_what_evaluate_cannot_find_or_use_is_said(accuracy, capsys):
    assert "checkpoint results/b: no results/b/last.json" in refused(["evaluate", "results/b"], capsys)
    assert "--which best: " in refused(["evaluate", "a/last.json", "--which", "best"], capsys)
    main(["evaluate", "a", "--which", "best", "--dataset", "digits"])


# plot


def test_comparisons_do_not_overwrite_each_other():
    for name in ("a", "b", "c"):
        made_run(name)
    main(["plot", "a", "b"])
    main(["plot", "results/a", "c"])
    main(["plot", "a", "b", "c", "--name", "mine"])
    assert sorted(path.name for path in Path("plots").iterdir()) == ["a-vs-b", "a-vs-c", "mine"]


def test_names_of_many_are_short_and_their_own():
    names = [f"run-number-{number}" for number in range(30)]
    assert len(name_together(names)) < 120
    assert name_together(names) == name_together(names) != name_together(names[:-1])
    assert name_together(["x" * 300, "y"]).count("x") < 100
    assert name_together(["a", "b"]) == "a-vs-b"


def test_masks_are_drawn_into_folders_of_their_own(capsys):
    edit = ["editing", *SMALL, "--criterion", "random", "--head", "random", "--num_iterations", "1", "--run_name"]
    for seed, name in enumerate("mno"):
        main([*edit, name, "--seed", str(seed)])
    masks = [f"masks/{name}.safetensors" for name in "mno"]
    main(["mask", "compare", *masks[:2]])
    main(["plot", "--masks", *masks[1:]])
    main(["plot", "--masks", masks[0], "--name", "alone"])
    said = capsys.readouterr().out
    for path in ("plots/n-vs-o/overlap.png", "plots/alone/m_density.png"):
        assert path in said
        assert Path(path).exists()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"dataset": "digits"}, {"dataset": "digits"}, True),
        ({"dataset": "digits"}, {}, True),  # nothing is known of the second
        ({"dataset": "digits"}, {"dataset": "cifar10"}, False),
        ({"dataset": "cifar100"}, {"dataset": "cifar10"}, False),
        ({"dataset": "folder", "data_dir": "x"}, {"dataset": "folder", "data_dir": "x"}, True),
        ({"dataset": "folder", "data_dir": "x"}, {"dataset": "folder", "data_dir": "y"}, False),
        ({"dataset": "folder", "data_dir": "x"}, {"dataset": "digits"}, False),
        (
            {"dataset": "folder", "data_dir": "x", "made_by": {"folder": "/a", "inputs": {"data": "1"}}},
            {"dataset": "folder", "data_dir": "x", "made_by": {"folder": "/b", "inputs": {"data": "2"}}},
            False,
        ),
        (
            {"dataset": "folder", "data_dir": "x", "made_by": {"folder": "/a", "inputs": {"data": "1"}}},
            {"dataset": "folder", "data_dir": "x", "made_by": {"folder": "/b", "inputs": {"data": "1"}}},
            True,  # moved
        ),
    ],
)
def test_runs_of_different_images_are_not_drawn_on_one_axis(first, second, same):
    runs = [made_run("a", **first), made_run("b", **second)]
    if same:
        assert plot_comparison(runs, Path("plots"))
        return
    with pytest.raises(InputError, match=r"runs to compare: a is of .* and b of .*, whose accuracies"):
        plot_comparison(runs, Path("plots"))
    assert not Path("plots").exists()


def test_a_grid_of_several_data_sets_is_refused_before_it_runs_unless_they_are_panels():
    data = {"data": {"c10": {"dataset": "cifar10"}, "c100": {"dataset": "cifar100"}}}
    method = {"method": {"head": {"trainable": "head"}, "all": {}}}
    with pytest.raises(InputError, match="lines of cifar10 and cifar100 in one figure"):
        check_data(expand("g", Grid(grid=[{"command": "federated", "axes": {**method, **data}}]), {}))
    check_data(expand("g", Grid(grid=[{"command": "federated", "axes": {**data, **method}}]), {}))


GRID = {
    "seeds": [0, 1],
    "options": {"dataset": "digits", "model_size": "micro", "image_size": 8, "patch_size": 4, "weights": "none"},
    "grid": [
        {
            "command": "centralized",
            "options": {"num_epochs": 3, "train_limit": 40, "eval_limit": 20},
            "axes": {"method": {"head": {"trainable": "head"}, "all": {}}},
        }
    ],
}


def test_a_sweeps_folder_is_plotted_as_the_sweep_does(monkeypatch, capsys):
    Path("configs").mkdir()
    Path("configs/experiment_configs.yaml").write_text(yaml.safe_dump({"g": GRID}))
    main(["sweep", "g", "--device", "cpu", "--seeds", "3"])
    drawn = {path.name: path.read_bytes() for path in Path("plots/g").glob("*.png")}
    assert drawn.keys() == {"accuracy_by_epoch.png"}  # two final figures are no picture
    for words in (["g"], ["results/g"], ["results/g", "--name", "again"]):
        main(["plot", *words])
    for folder in ("g", "again"):
        assert {path.name: path.read_bytes() for path in Path("plots", folder).glob("*.png")} == drawn
    assert "results/g is of a sweep, whose figures are its own" in refused(["plot", "g", "g-head-s3"], capsys)
    Path("configs/experiment_configs.yaml").unlink()
    assert "no 'g' in " in refused(["plot", "g"], capsys)


def test_a_folder_of_a_runs_name_is_not_taken_for_it():
    made_run("digits")
    Path("digits").mkdir()
    main(["plot", "digits"])
    assert [path.name for path in Path("plots/digits").iterdir()] == ["curves.png"]
