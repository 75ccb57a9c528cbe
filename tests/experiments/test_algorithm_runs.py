"""--algorithm, and how clients fare at the end, through the real command line."""

import csv
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from commands import interrupt_after

from fedtalos.app.report.contents import client_accuracies
from fedtalos.app.run.client_accuracy import write_client_accuracy
from fedtalos.app.run.paths import RunPaths
from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main
from fedtalos.data.images import LabelledImages
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.personal import accuracy_by_client, mean_and_worst

DIGITS = shlex.split(
    "--dataset digits --model_size micro --image_size 8 --patch_size 4 --eval_limit 40 --weights none --threads 1 "
    "--device cpu --precision fp32"
)
FEDERATED = ["federated", *DIGITS, *shlex.split("--train_limit 300 --num_clients 6 --client_fraction 0.5")]
FEDERATED += shlex.split("--num_rounds 4 --local_steps 2 --batch_size 16 --eval_every 2")
ALGORITHMS = ("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "scaffold", "fednova")

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


def federate(name: str, options: str = "") -> None:
    main([*FEDERATED, "--run_name", name, *shlex.split(options)])


def edit(name: str) -> None:
    options = f"--criterion random --target_sparsity 0.8 --run_name {name} --head random"
    main(["editing", *DIGITS, *shlex.split(options)])


def tensors(run: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path("checkpoints", run, "last.json")).tensors


def rows(run: str, file: str = "metrics.csv") -> list[dict[str, str]]:
    with Path("results", run, file).open() as lines:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(lines)]


def summary(run: str) -> dict:
    return yaml.safe_load(Path("results", run, "summary.yaml").read_text())


def same(first: str, second: str) -> bool:
    """The models, to the bit."""
    a, b = ({name: t for name, t in tensors(run).items() if "/" not in name} for run in (first, second))
    assert a.keys() == b.keys()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_each_algorithm_with_a_mask_moves_only_what_may_move_and_all_differ():
    edit("m")
    mask, _ = read_mask_file(Path("masks/m.safetensors"))
    start = VisionTransformer(Architecture("micro", 8, 4, 10), torch_generator(0, "weights")).state_dict()
    found = {}
    for name in ALGORITHMS:
        epochs = "--local_epochs 1 --local_steps 4 --partition quantity"  # steps at their default: they have no effect
        federate(name, f"--algorithm {name} --mask masks/m.safetensors {epochs}")
        found[name] = tensors(name)
        for key, before in start.items():
            moves = mask.get(key, torch.full_like(before, key.startswith("head."), dtype=torch.bool))
            assert torch.equal(found[name][key][~moves], before[~moves]), (name, key)
        assert not torch.equal(found[name]["head.weight"], start["head.weight"])
        active = sum(int(tensor.sum()) for tensor in mask.values()) + sum(
            start[f"head.{part}"].numel() for part in ("weight", "bias")
        )
        assert all(len(t) == active for key, t in found[name].items() if key.startswith("algorithm/"))
    for number, first in enumerate(ALGORITHMS):
        assert not any(same(first, second) for second in ALGORITHMS[number + 1 :])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        "--algorithm fedprox --prox_mu 0",
        "--algorithm fedavgm --server_momentum 0 --server_learning_rate 1",
        "--algorithm fednova",
        "--algorithm scaffold --num_rounds 1",
    ],
)
def test_what_is_fedavg_is_so_to_the_bit(options, masked):
    both = "--schedule constant"
    if masked:
        edit("m")
        both += " --mask masks/m.safetensors"
    federate("ours", f"{options} {both}")
    federate("plain", f"{'--num_rounds 1 ' if 'num_rounds 1' in options else ''}{both}")
    assert same("ours", "plain")


def test_scaffold_sends_its_control_variates_both_ways():
    federate("plain")
    federate("double", "--algorithm scaffold")
    for way in ("bytes_down", "bytes_up"):
        assert [2 * int(row[way]) for row in rows("plain")] == [int(row[way]) for row in rows("double")]


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "scaffold", "scaffold --server_learning_rate 0.5"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, monkeypatch):
    federate("whole", f"--algorithm {name}")
    with monkeypatch.context() as patched:
        interrupt_after(patched, 8)  # in the third round: the checkpoint is of the second
        with pytest.raises(SystemExit, match="130"):
            federate("cut", f"--algorithm {name}")
    main(["federated", "--resume", "--run_name", "cut"])
    assert rows("whole") == rows("cut")
    whole, cut = tensors("whole"), tensors("cut")
    assert whole.keys() == cut.keys()
    assert any(key.startswith("algorithm/") for key in whole)
    assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("name", ["fedprox --prox_mu 1", pytest.param("fedyogi", marks=pytest.mark.slow)])
def test_two_workers_equal_one_bit_for_bit(name):
    federate("alone", f"--algorithm {name}")
    federate("shared", f"--algorithm {name} --workers 2")
    assert rows("alone") == rows("shared")
    alone, shared = tensors("alone"), tensors("shared")
    assert alone.keys() == shared.keys()
    assert all(torch.equal(tensor, shared[key]) for key, tensor in alone.items())


def test_training_that_fails_in_a_worker_of_scaffold_is_said_as_anywhere(capsys):
    with pytest.raises(SystemExit, match="1"):
        federate("lost", "--algorithm scaffold --workers 3 --learning_rate 1e15 --clip_norm None --optimizer sgd")
    assert "round 1, client" in capsys.readouterr().err


def test_a_run_can_be_made_again_from_its_config():
    federate("first", "--algorithm fedadagrad")
    saved = yaml.safe_load(Path("results/first/config.yaml").read_text())
    assert (saved["server_learning_rate"], saved["server_momentum"]) == (0.001, 0.0)
    main(["federated", "--config", "results/first/config.yaml", "--run_name", "second"])
    assert same("first", "second")


def test_accuracy_by_client_is_the_mean_over_its_images():
    draw = np.random.default_rng(0)
    owner, labels = draw.integers(0, 5, 200), draw.integers(0, 7, 200)
    by_class = np.array([0.1, 0.5, np.nan, 0.9, 1.0, 0.0, 0.3])
    labels[owner == 4] = 2  # its only class has no test image
    images = LabelledImages(torch.zeros(200, 0), torch.from_numpy(labels))
    found = accuracy_by_client(Clients.of(images, owner, 5), by_class)
    for client in range(4):
        own = [by_class[label] for label in labels[owner == client] if label != 2]
        assert found[client] == pytest.approx(sum(own) / len(own))
    assert np.isnan(found[4])


def test_mean_and_worst_tenth():
    accuracies = np.concatenate([np.linspace(0, 1, 21), [np.nan]])
    assert mean_and_worst(accuracies) == {"mean": 0.5, "worst_10_percent": pytest.approx(0.05)}
    assert mean_and_worst(np.array([0.25]))["worst_10_percent"] == 0.25


def test_the_report_shows_the_means_that_the_summary_has(tmp_path):
    """Of 12 clients the worst tenth are two; of one no class was tested."""
    paths = RunPaths(tmp_path, "run")
    accuracies = np.array([np.nan, *np.linspace(0, 0.11, 12)])
    write_client_accuracy(paths, np.full(13, 5), {"accuracy": accuracies})
    shown = client_accuracies(SimpleNamespace(paths=paths))
    said = mean_and_worst(accuracies)
    assert (shown.mean, shown.worst) == (f"{100 * said['mean']:.1f} %", f"{100 * said['worst_10_percent']:.1f} %")
    assert shown.worst == "0.5 %"


def test_clients_that_hold_all_classes_alike_fare_as_the_test_says_and_personal_models_are_left_nowhere():
    skew = "--partition label_skew --classes_per_client 2 --eval_limit 400"
    federate("plain", skew)
    federate("asked", f"{skew} --personalise_steps 8 --personalise_clients 4")
    assert same("plain", "asked")
    assert rows("plain") == rows("asked")
    found, plain = summary("asked"), summary("plain")
    assert found["test_accuracy"] == plain["test_accuracy"]
    assert "client_test_accuracy" not in plain
    by_client = rows("asked", "client_accuracy.csv")
    assert [int(row["client"]) for row in by_client] == list(range(6))
    personal = [row for row in by_client if row["personalised_accuracy"]]
    assert len(personal) == found["personalised_test_accuracy"]["clients"] == 4
    for when, column in (("before", "accuracy"), ("after", "personalised_accuracy")):
        values = np.array([float(row[column]) for row in personal])
        expected = {"mean": values.mean(), "worst_10_percent": values.min()}
        assert found["personalised_test_accuracy"][when] == pytest.approx(expected, abs=2e-6)
    assert found["personalised_test_accuracy"]["after"]["mean"] > found["personalised_test_accuracy"]["before"]["mean"]


def test_client_evaluation_of_one_client_with_everything_is_near_the_test_accuracy():
    federate("one", "--num_clients 1 --client_fraction 1 --client_evaluation --eval_limit 400")
    found = summary("one")["client_test_accuracy"]
    assert found["mean"] == found["worst_10_percent"]
    assert found["mean"] == pytest.approx(summary("one")["test_accuracy"]["last"], abs=0.03)  # classes, not images
