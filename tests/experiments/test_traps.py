"""Traps on the main path: masks without their head, runs that lose, files looked for too late."""

import shlex
from pathlib import Path

import pytest
import yaml

from fedtalos.app import load as loading
from fedtalos.cli import main

DIGITS = "--dataset digits --train_limit 200 --eval_limit 60 --calibration_fraction 0.1 --device cpu"
ROUNDS = f"federated {DIGITS} --weights base --num_clients 4 --num_rounds 1 --local_steps 1 --batch_size 8"

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture
def edited(in_a_folder_of_its_own) -> Path:
    """A model trained on digits, and a mask of it made through a new ridge head."""
    main(shlex.split(f"centralized {DIGITS} --num_epochs 8 --run_name base"))
    main(shlex.split(f"editing {DIGITS} --weights base --head ridge --num_iterations 1 --run_name m"))
    return in_a_folder_of_its_own


def config(run: str) -> dict:
    return yaml.safe_load(Path("results", run, "config.yaml").read_text())


def federate(options: str, run: str = "run") -> None:
    main(shlex.split(f"{ROUNDS} {options} --run_name {run}"))


def foreign_classes(monkeypatch) -> None:
    """Make the base's head one of other classes, so that `auto` cannot take it."""
    read = loading.checkpoint_weights

    def renamed(path):
        from dataclasses import replace

        return replace(read(path), classes=tuple(f"class {n}" for n in range(10)))

    monkeypatch.setattr(loading, "checkpoint_weights", renamed)


def test_digits_need_no_weights_from_anywhere(in_a_folder_of_its_own):
    main(shlex.split(f"centralized {DIGITS} --num_epochs 1 --run_name a"))
    found = config("a")
    assert [found[key] for key in ("weights", "model_size", "image_size", "patch_size")] == ["none", "micro", 8, 2]


def test_a_mask_brings_the_head_beside_it_which_stays_frozen(edited, monkeypatch):
    foreign_classes(monkeypatch)
    federate("--mask masks/m.safetensors")
    found = config("run")
    assert (found["head"], found["freeze_head"]) == ("masks/m.head.safetensors", True)
    federate("--mask masks/m.safetensors --train_head", "moving")
    assert config("moving")["freeze_head"] is False


def test_a_mask_without_its_head_is_refused_with_what_to_do(edited, monkeypatch, capsys):
    foreign_classes(monkeypatch)
    Path("masks/m.head.safetensors").rename("elsewhere.safetensors")
    with pytest.raises(SystemExit, match="2"):
        federate("--mask masks/m.safetensors")
    said = capsys.readouterr().err
    assert "made through a head (ridge) that is not at hand" in said
    assert "--head ridge to fit it anew" in said
    assert not Path("results/run").exists()
    federate("--mask masks/m.safetensors --head random", "new")
    assert config("new")["freeze_head"] is False
    federate("--mask masks/m.safetensors --head ridge", "anew")
    assert config("anew")["freeze_head"] is True


def test_editing_says_the_next_command_which_runs(edited, capsys):
    held_out = "--val_fraction 0.2 --split_seed 3 --calibration federated --num_clients 4 --data_dir 'my own'"
    main(shlex.split(f"editing {DIGITS} --checkpoint checkpoints/base --num_iterations 1 --run_name n {held_out}"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train with it: "))
    command = shlex.split(line.removeprefix("train with it: fedtalos "))
    assert command[0] == "federated"
    main([*command, "--num_rounds", "1", "--local_steps", "1", "--device", "cpu", "--run_name", "next"])
    for name in ("dataset", "data_dir", "val_fraction", "split_seed", "train_limit", "image_size", "num_clients"):
        assert config("n")[name] == config("next")[name]


def test_a_run_that_loses_says_so(edited, capsys):
    federate("--learning_rate 1 --optimizer sgd --num_rounds 2 --eval_every 1 --head weights", "worse")
    out = capsys.readouterr().out
    assert "training did not help: validation accuracy was" in out
    assert "try a lower --learning_rate, --freeze_head, or fewer steps between rounds" in out
    summary = yaml.safe_load(Path("results/worse/summary.yaml").read_text())
    assert summary["best_round"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--mask masks/none.safetensors", "mask masks/none.safetensors: no such file"),
        ("--head heads/none.safetensors", "--head heads/none.safetensors: no such file"),
        ("--dataset folder --data_dir nowhere", "--data_dir nowhere: no such folder"),
    ],
)
def test_local_files_are_looked_for_before_anything_is_fetched(options, said, edited, monkeypatch, capsys):
    def fetched(*_arguments, **_options):
        pytest.fail("weights were asked for first")

    monkeypatch.setattr(loading, "starting_weights", fetched)
    with pytest.raises(SystemExit, match="2"):
        federate(options)
    assert said in capsys.readouterr().err
    assert not Path("results/run").exists()


def test_train_head_wants_a_mask(capsys, in_a_folder_of_its_own):
    with pytest.raises(SystemExit, match="2"):
        main(shlex.split(f"federated {DIGITS} --train_head"))
    assert "--train_head: lets a fitted head move under a mask" in capsys.readouterr().err
