"""Attacks, robust rules, clipping and privacy through the real command line."""

import csv
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from commands import interrupt_after
from PIL import Image

from fedtalos.app import federation
from fedtalos.app.run.session import Session
from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main, parse
from fedtalos.errors import InputError
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.federated.client_sampling import sample_clients
from fedtalos.training.federated.privacy import epsilon

DIGITS = shlex.split(
    "--dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --threads 1 --device cpu "
    "--precision fp32"
)
SMALL = ["federated", *DIGITS, *shlex.split("--train_limit 300 --eval_limit 40 --num_clients 6 --client_fraction 1")]
SMALL += shlex.split("--num_rounds 3 --local_steps 1 --batch_size 8 --eval_every 2")
PRIVATE = "--dp_noise 0.5 --max_update_norm 0.3"

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


@pytest.fixture
def without_the_library(monkeypatch):
    monkeypatch.setattr(federation, "epsilon", lambda **known: 1.23456 * known["rounds"])


def federate(name: str, options: str = "") -> None:
    main([*SMALL, "--run_name", name, *shlex.split(options)])


def tensors(run: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path("checkpoints", run, "last.json")).tensors


def summary(run: str) -> dict:
    return yaml.safe_load(Path("results", run, "summary.yaml").read_text())


def rows(run: str) -> list[list[str]]:
    with Path("results", run, "metrics.csv").open() as lines:
        return [row[:-1] for row in csv.reader(lines)]


def assert_same(first: str, second: str) -> None:
    assert rows(first) == rows(second)
    theirs = tensors(second)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors(first).items())


def test_under_attack_robust_rules_keep_the_accuracy_and_the_mean_does_not():
    learn = "--train_limit 1000 --eval_limit 200 --num_clients 7 --num_rounds 8 --local_steps 2 --batch_size 32 "
    learn += "--eval_every 8 --learning_rate 3e-3 "
    federate("unhurt", learn)
    accuracy = summary("unhurt")["test_accuracy"]["last"]
    federate("hurt", f"{learn} --attackers 2 --attack scaled --num_rounds 2")
    assert summary("hurt")["test_accuracy"]["last"] < 0.3 < accuracy - 0.1
    for options in (
        "--aggregation median --attack scaled --attackers 2",
        "--aggregation multi_krum --byzantine 2 --attack nan --attackers 2",
        "--aggregation trimmed_mean --attack sign_flip --attackers 1",
    ):
        rule = options.split()[1]
        federate(rule, f"{learn} {options}")
        assert summary(rule)["test_accuracy"]["last"] > accuracy - 0.15, rule


@pytest.mark.parametrize(
    "options", ["--aggregation krum --attack scaled --attackers 2", f"{PRIVATE} --algorithm fedadam"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(options, monkeypatch, without_the_library):
    federate("whole", options)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 14)  # in the third round: the checkpoint is of the second
        with pytest.raises(SystemExit, match="130"):
            federate("cut", options)
    main(["federated", "--resume", "--run_name", "cut"])
    assert_same("whole", "cut")
    assert summary("whole").get("privacy") == summary("cut").get("privacy")


@pytest.mark.parametrize("options", ["--aggregation trimmed_mean --attack sign_flip --attackers 1 --max_update_norm 1"])
def test_many_workers_equal_one_bit_for_bit(options):
    federate("alone", options)
    federate("many", options + " --workers 2")
    assert_same("alone", "many")


@pytest.mark.parametrize("options", ["--aggregation median", "--aggregation krum", PRIVATE, "--max_update_norm 0.1"])
def test_with_a_mask_only_what_may_move_moves(options, without_the_library):
    main(["editing", *DIGITS, *shlex.split("--criterion random --target_sparsity 0.8 --run_name m --head random")])
    mask, _ = read_mask_file(Path("masks/m.safetensors"))
    federate("run", f"--mask masks/m.safetensors --freeze_head {options}")
    start = VisionTransformer(Architecture("micro", 8, 4, 10), torch_generator(0, "weights")).state_dict()
    end = {name: tensor for name, tensor in tensors("run").items() if "/" not in name}
    for name, tensor in end.items():
        moves = mask.get(name, torch.zeros_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor[~moves], start[name][~moves]), name
    assert any(not torch.equal(tensor, start[name]) for name, tensor in end.items())


def test_privacy_is_that_of_the_clients_that_the_data_name(without_the_library):
    rows = [f"{i}.png,{i % 2},{i % 3}" for i in range(24)]
    Path("t.csv").write_text("\n".join(["path,label,client", *rows]))
    for i in range(24):
        Image.new("RGB", (8, 8), (i, 0, 250 * (i % 2))).save(f"{i}.png")
    data = f"--dataset csv --data_dir t.csv --partition given --val_fraction 0.2 --run_name run {PRIVATE}"
    main(["federated", *DIGITS, *shlex.split(f"{data} --num_rounds 1 --client_fraction 0.4 --local_steps 1")])
    assert summary("run")["privacy"]["sampling"] == "uniform, 1 of 3"


def test_large_norms_clip_nothing_and_small_ones_hold_the_model():
    for name, options in {"plain": "", "loose": "--max_update_norm 1e6", "tight": "--max_update_norm 1e-9"}.items():
        federate(name, f"--num_rounds 1 {options}")
    assert_same("plain", "loose")
    start = VisionTransformer(Architecture("micro", 8, 4, 10), torch_generator(0, "weights")).state_dict()
    assert all(torch.allclose(tensor, start[name], atol=1e-8) for name, tensor in tensors("tight").items())


def test_the_summary_says_what_privacy_was_spent():
    pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    federate("private", f"{PRIVATE} --dp_delta 1e-4")
    said = summary("private")["privacy"]
    assert said.pop("epsilon") > 1
    noise = {"delta": 1e-4, "noise_multiplier": 0.5, "clip": 0.3}
    assert said == noise | {"sampling": "uniform, 6 of 6", "adjacency": "replace one client"}
    federate("poisson", f"{PRIVATE} --dp_delta 1e-4 --client_fraction 0.25 --client_sampling poisson")
    said = summary("poisson")["privacy"]
    known = {"noise_multiplier": 0.5, "delta": 1e-4, "clients": 6, "sampled": 1.5, "rounds": 3}
    assert said.pop("epsilon") == round(epsilon(**known, sampling="poisson"), 4)
    sampling = {"sampling": "poisson, each client with probability 0.25", "adjacency": "add or remove one client"}
    assert said == noise | sampling


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("", marks=pytest.mark.slow),
        f"{PRIVATE} --algorithm fedadam",
        "--algorithm scaffold --optimizer sgd",
    ],
)
def test_poisson_rounds_resume_and_are_those_of_many_workers(options, monkeypatch, without_the_library):
    options += " --client_sampling poisson --client_fraction 0.2 --num_rounds 5 --eval_every 1 --threads 1 --seed 2"
    federate("whole", options)
    federate("many", options + " --workers 2")
    assert_same("whole", "many")
    clients = [sample_clients(6, 0.2, 2, number, "poisson") for number in range(1, 6)]
    assert () in clients  # where the run is cut
    first = next(number for number in range(5) if clients[number] == ())
    original, seen = Session.validate, []

    def validate(self, evaluate):
        metrics = original(self, evaluate)
        seen.append(self.done)
        if self.done == first + 1:
            raise KeyboardInterrupt
        return metrics

    with monkeypatch.context() as patched:
        patched.setattr(Session, "validate", validate)
        with pytest.raises(SystemExit, match="130"):
            federate("cut", options)
    main(["federated", "--resume", "--run_name", "cut"])
    assert_same("whole", "cut")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--aggregation krum --byzantine 2", "krum against 2 attackers needs over 6 clients in a round, got 6"),
        ("--aggregation trimmed_mean --byzantine 3", "needs over 6 clients in a round, got 6"),
        ("--aggregation median --byzantine 2", "is of --aggregation trimmed_mean or krum or multi_krum"),
        ("--aggregation median --algorithm scaffold", "scaffold is made for means"),
        ("--aggregation median --head linear", "give a head FILE"),
        ("--aggregation median --client_sampling poisson", "median needs a fixed number of clients"),
        ("--attack nan", "give both, or neither"),
        ("--attackers 2", "give both, or neither"),
        ("--attack nan --attackers 7", "there are only 6 clients"),
        ("--dp_noise 1", "give --max_update_norm too"),
        ("--dp_delta 0.01", "give --dp_noise too"),
        (f"{PRIVATE} --aggregation median", "its account is of a mean"),
        (f"{PRIVATE} --algorithm fednova", "uses more of a client than its clipped update"),
        (f"{PRIVATE} --head ridge", "without noise"),
        (f"{PRIVATE} --dp_delta 0.5", "is to be below 0.166667"),
    ],
)
def test_options_that_contradict_each_other_are_refused_in_words(options, said):
    with pytest.raises(InputError, match=said):
        parse([*SMALL, *shlex.split(options)])
