"""The real command line, on embedded digits: the identities that make a run trustworthy."""

import csv
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import interrupt_after
from safetensors.torch import load_file, save_file

from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.mask_file import read_mask_file

ROOT = Path(__file__).parents[2]
DIGITS = shlex.split("--dataset digits --model_size micro --image_size 8 --patch_size 4 --eval_limit 40")
SCRATCH = [*DIGITS, "--weights", "none"]
CENTRALIZED = ["centralized", *SCRATCH, "--train_limit", "150", "--num_epochs", "3"]
FEDERATED = [
    "federated",
    *SCRATCH,
    *shlex.split("--train_limit 300 --num_clients 6 --client_fraction 0.5 --num_rounds 4"),
]
FEDERATED += shlex.split("--local_steps 2 --batch_size 16 --eval_every 2")
EDITING = ["editing", *SCRATCH, "--calibration_fraction", "0.05", "--num_iterations", "3"]


@pytest.fixture(autouse=True)
def mostly_without_figures(request, in_a_folder_of_its_own):
    if "draws" not in request.keywords:  # one test looks at the figures
        request.getfixturevalue("without_figures")


def tensors(run: str, name: str = "last") -> dict[str, torch.Tensor]:
    return load_checkpoint(Path("checkpoints", run, f"{name}.json")).tensors


def rows(run: str, file: str = "metrics.csv") -> list[dict[str, str]]:
    """Everything but the timing column."""
    with Path("results", run, file).open() as lines:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(lines)]


def same_tensors(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_one_client_with_everything_for_an_epoch_equals_an_epoch_of_centralised_training():
    shared = [*SCRATCH, "--train_limit", "150", "--schedule", "constant", "--batch_size", "32"]
    main(["centralized", *shared, "--num_epochs", "1", "--run_name", "c"])
    one = shlex.split("--num_clients 1 --client_fraction 1 --local_epochs 1 --num_rounds 1")
    main(["federated", *shared, *one, "--run_name", "f"])
    central = {name: t for name, t in tensors("c").items() if "/" not in name}
    same_tensors(central, tensors("f"))
    figures = [[row["loss"], row["accuracy"]] for row in rows("c")]
    assert figures == [[row["loss"], row["accuracy"]] for row in rows("f")]


@pytest.mark.parametrize("command", [CENTRALIZED, FEDERATED])
def test_a_seed_fixes_every_figure_and_another_seed_changes_them(command):
    main([*command, "--run_name", "a"])
    torch.set_float32_matmul_precision("high")  # as a run on CUDA leaves it
    main([*command, "--run_name", "b"])
    assert torch.get_float32_matmul_precision() == "highest"
    main([*command, "--run_name", "c", "--seed", "1"])
    assert rows("a") == rows("b") != rows("c")
    same_tensors(tensors("a"), tensors("b"))
    assert [row["split"] for row in rows("a")].count("test") == 1


@pytest.mark.parametrize(
    ("command", "calls"),
    [
        (CENTRALIZED, 0),
        (CENTRALIZED, 2),
        (FEDERATED, 0),
        (FEDERATED, 2),
        (FEDERATED, 8),
        ([*FEDERATED, "--trainable", "head"], 8),  # on cached features
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(command, calls, monkeypatch):
    main([*command, "--run_name", "whole"])
    with monkeypatch.context() as patched:
        interrupt_after(patched, calls)
        with pytest.raises(SystemExit) as stop:
            main([*command, "--run_name", "cut"])
    assert stop.value.code == 130
    main([*command, "--resume"])
    assert rows("whole") == rows("cut")
    same_tensors(tensors("whole"), tensors("cut"))
    same_tensors(tensors("whole", "best"), tensors("cut", "best"))


def test_a_resumed_edit_equals_an_uninterrupted_one(monkeypatch):
    from fedtalos.training.editing import sensitivity

    main([*EDITING, "--run_name", "whole"])
    original, seen = sensitivity.scores_of_each, []

    def scores(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(sensitivity, "scores_of_each", scores)
        with pytest.raises(SystemExit):
            main([*EDITING, "--run_name", "cut"])
    main([*EDITING, "--run_name", "cut", "--resume"])
    assert Path("masks/whole.safetensors").read_bytes() == Path("masks/cut.safetensors").read_bytes()
    assert rows("whole", "iterations.csv") == rows("cut", "iterations.csv")
    assert rows("whole", "report.csv") == rows("cut", "report.csv")


def test_a_killed_process_leaves_a_run_that_resumes():
    main([*FEDERATED, "--run_name", "whole"])
    command = [sys.executable, str(ROOT / "main.py"), *FEDERATED, "--run_name", "cut"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not Path("checkpoints/cut/last.json").exists() and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not Path("results/cut/summary.yaml").exists():
        main([*FEDERATED, "--run_name", "cut", "--resume"])
    assert rows("whole") == rows("cut")
    same_tensors(tensors("whole"), tensors("cut"))


def test_clients_train_together_as_one_after_another():
    main([*FEDERATED, "--run_name", "alone"])
    main([*FEDERATED, "--clients_at_once", "3", "--run_name", "together"])
    sizes = [
        yaml.safe_load(Path(f"results/{run}/config.yaml").read_text())["clients_at_once"]
        for run in ("alone", "together")
    ]
    assert sizes == [1, 3]
    for one, other in zip(rows("alone"), rows("together"), strict=True):
        assert {key: value for key, value in other.items() if key not in ("loss", "accuracy")} == {
            key: value for key, value in one.items() if key not in ("loss", "accuracy")
        }
        assert float(other["loss"]) == pytest.approx(float(one["loss"]), rel=1e-3)


def test_a_run_of_a_preset_resumes_by_the_preset(monkeypatch):
    Path("configs").mkdir()
    preset = "quick: {command: federated, run_name: named, output_dir: out, num_rounds: 4, num_clients: 3}"
    Path("configs/experiment_configs.yaml").write_text(preset)
    command = ["federated", *SCRATCH, "--preset", "quick"]
    with monkeypatch.context() as patched:
        interrupt_after(patched, 1)
        with pytest.raises(SystemExit):
            main(command)
    main([*command, "--resume"])
    assert Path("out/results/named/summary.yaml").exists()


def test_finished_runs_are_left_alone(capsys):
    main([*CENTRALIZED, "--run_name", "a"])
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    main([*CENTRALIZED, "--run_name", "a", "--resume"])
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def edited(name: str = "m", *flags: str) -> Path:
    main([*EDITING, "--run_name", name, *flags])
    return Path("masks", f"{name}.safetensors")


def test_an_all_true_mask_equals_no_mask(monkeypatch):
    """No file holds such a mask, for keys' biases are never eligible; it is handed over in the file's place."""
    mask, facts = read_mask_file(edited())
    everything = {name: torch.ones_like(tensor) for name, tensor in mask.items()}
    count = sum(tensor.numel() for tensor in everything.values())
    made = (everything, replace(facts, active=count, eligible=count))
    monkeypatch.setattr("fedtalos.app.load.read_mask_file", lambda _: made)
    rate = ["--learning_rate", "1e-3"]
    main([*FEDERATED, *rate, "--mask", "masks/all.safetensors", "--head", "random", "--run_name", "masked"])
    main([*FEDERATED, *rate, "--trainable", "blocks", "--run_name", "dense"])
    same_tensors(tensors("masked"), tensors("dense"))
    keep = [{k: v for k, v in row.items() if not k.startswith("bytes")} for row in rows("masked")]
    assert keep == [{k: v for k, v in row.items() if not k.startswith("bytes")} for row in rows("dense")]


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("command", [CENTRALIZED, FEDERATED])
def test_frozen_entries_keep_their_bits_and_only_active_values_are_sent(rule, command):
    path = edited()
    flags = ["--optimizer", rule, "--weight_decay", "0.1", "--learning_rate", "1e-2"]
    main([*command, *flags, "--mask", str(path), "--head", "random", "--run_name", "run"])
    mask, facts = read_mask_file(path)
    before = VisionTransformer(Architecture("micro", 8, 4, 10), torch_generator(0, "weights")).state_dict()
    after, moved = tensors("run"), 0
    for name, value in after.items():
        if "/" in name or name.startswith("head."):
            continue
        frozen = ~mask[name] if name in mask else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[frozen].view(torch.int32), before[name][frozen].view(torch.int32)), name
        moved += int((value != before[name]).sum())
    assert moved > 0.5 * facts.active
    if command is FEDERATED:
        head = 10 * 96 + 10
        up = 4 * 3 * (facts.active + head) * 4  # rounds, clients, float32 values
        assert int(rows("run")[-1]["bytes_up"]) == up
        bits = sum(-(-tensor.numel() // 8) for tensor in mask.values())
        down = int(rows("run")[-1]["bytes_down"]) - up
        assert down % bits == 0
        assert 3 <= down // bits <= 6  # each client that took part gets the mask once


def test_a_frozen_head_stays_and_a_head_that_came_along_stays_under_a_mask():
    main([*CENTRALIZED, "--run_name", "start"])
    start = tensors("start")
    masked = ["--weights", "checkpoints/start/last.json", "--run_name", "masked"]
    path = edited("m", "--weights", "auto", "--checkpoint", "start")
    main(["federated", *DIGITS, *FEDERATED[1 + len(SCRATCH) :], *masked, "--mask", str(path)])
    assert torch.equal(tensors("masked")["head.weight"], start["head.weight"])
    main([*FEDERATED, "--freeze_head", "--head", "ridge", "--run_name", "ridge"])
    assert torch.equal(tensors("ridge")["head.weight"], tensors("ridge", "best")["head.weight"])
    assert not Path("masks/m.head.safetensors").exists()  # the checkpoint's own head was used


@pytest.mark.parametrize("command", [CENTRALIZED, FEDERATED])
def test_a_head_on_cached_features_learns_as_on_images(command, monkeypatch):
    main([*command, "--trainable", "head", "--run_name", "cached"])
    main([*command, "--trainable", "head", "--run_name", "on_disk", "--cache_gb", "0"])
    monkeypatch.setattr(VisionTransformer, "frozen_stages", lambda *_: 0)
    main([*command, "--trainable", "head", "--run_name", "plain"])
    same_tensors(tensors("cached"), tensors("on_disk"))
    assert rows("cached") == rows("on_disk")
    for name, tensor in tensors("plain").items():
        torch.testing.assert_close(tensors("cached")[name], tensor, rtol=1e-4, atol=1e-5)


def test_pruned_entries_are_zero():
    path = edited("m", "--criterion", "highest_magnitude", "--target_sparsity", "0.5")
    main([*CENTRALIZED, "--mask", str(path), "--mask_mode", "prune", "--run_name", "p"])
    mask, _ = read_mask_file(path)
    for name, keep in mask.items():
        assert not tensors("p")[name][~keep].any(), name


def test_entries_that_were_not_eligible_are_not_pruned():
    path = edited("m", "--eligible", "qk", "--target_sparsity", "0.5")
    main([*CENTRALIZED, "--mask", str(path), "--mask_mode", "prune", "--run_name", "p"])
    mask, _ = read_mask_file(path)
    for name, after in tensors("p").items():
        if name.endswith("attn.qkv.weight"):
            assert not after[: 2 * 96][~mask[name][: 2 * 96]].any()
            assert bool(after[2 * 96 :].all())  # v


def test_editing_leaves_a_head_a_report_and_an_exact_mask():
    mask, facts = read_mask_file(edited("m", "--target_sparsity", "0.8"))
    assert facts.active == sum(int(tensor.sum()) for tensor in mask.values()) == round(0.2 * facts.eligible)
    assert load_file("masks/m.head.safetensors").keys() == {"head.weight", "head.bias"}
    report = [row for row in rows("m", "report.csv") if row["iteration"] == "3"]
    assert sum(int(row["active"]) for row in report) == facts.active
    assert {row["kind"] for row in report} == {"q", "k", "v", "proj", "fc1", "fc2", "norms", "biases"}
    densities = [float(row["density"]) for row in rows("m", "iterations.csv")]
    assert densities == pytest.approx([0.2 ** (r / 3) for r in (1, 2, 3)], abs=1e-5)


@pytest.mark.parametrize("criterion", ["most_sensitive", "lowest_magnitude", "random"])
def test_other_criteria_reach_the_same_density(criterion):
    _, facts = read_mask_file(edited("m", "--criterion", criterion))
    assert facts.active == round(0.1 * facts.eligible)
    assert facts.criterion == criterion


def test_evaluate_repeats_the_summary(capsys):
    main([*FEDERATED, "--run_name", "a"])
    summary = yaml.safe_load(Path("results/a/summary.yaml").read_text())
    capsys.readouterr()
    main(["evaluate", "a"])
    assert f"accuracy {100 * summary['test_accuracy']['last']:.2f} %" in capsys.readouterr().out
    main(["evaluate", "checkpoints/a/best.json", "--split", "val"])
    assert f"accuracy {100 * summary['val_accuracy']['best']:.2f} %" in capsys.readouterr().out


def test_evaluate_reads_as_many_images_as_asked_for(capsys):
    main([*FEDERATED, "--run_name", "a", "--eval_limit", "20"])
    for flags, examples in (([], 20), (["--eval_limit", "30"], 30), (["--eval_limit", "1000000"], 359)):
        capsys.readouterr()
        main(["evaluate", "a", *flags])
        assert f" of {examples})" in capsys.readouterr().out


@pytest.mark.draws
def test_a_run_leaves_its_records():
    main([*FEDERATED, "--run_name", "a", "--partition", "label_skew", "--classes_per_client", "2"])
    config = yaml.safe_load(Path("results/a/config.yaml").read_text())
    assert config["learning_rate"] == 1e-3
    assert config["image_size"] == 8
    assert {"torch", "commit", "device", "command_line"} <= config["made_by"].keys()
    for name in ("curves", "megabytes", "clients"):
        assert Path("plots/a", f"{name}.png").read_bytes().startswith(b"\x89PNG")
    main(["federated", "--config", "results/a/config.yaml", "--run_name", "b"])
    assert rows("a") == rows("b")


def test_tensorboard_gets_the_figures():
    pytest.importorskip("tensorboard")
    main([*CENTRALIZED, "--run_name", "a", "--tracker", "tensorboard"])
    assert list(Path("results/a/tensorboard").glob("events.*"))


def test_a_vit_with_registers_and_layer_scale_goes_through_every_command(capsys):
    architecture = Architecture("micro", 8, 4, 10, registers=2, layer_scale=True, class_position=False)
    save_file(VisionTransformer(architecture, torch_generator(0, "theirs")).state_dict(), "vit.safetensors")
    shared = shlex.split("--dataset digits --eval_limit 40 --weights vit.safetensors --image_size 16")
    main([*EDITING[:1], *shared, *EDITING[-4:], "--run_name", "m"])
    mask, facts = read_mask_file(Path("masks/m.safetensors"))
    assert not any(name.endswith(".gamma") for name in mask)
    assert (facts.model["registers"], bool(facts.model["layer_scale"])) == (2, True)
    train = [*FEDERATED[:1], *shared, *FEDERATED[len(SCRATCH) + 1 :], "--run_name", "f"]
    main([*train, "--mask", "masks/m.safetensors"])
    before, after = load_file("vit.safetensors"), tensors("f")
    assert after["reg_token"].shape == (1, 2, 96)
    moved = {name for name, tensor in before.items() if name != "pos_embed" and not torch.equal(tensor, after[name])}
    assert moved <= {*mask, "head.weight", "head.bias"}
    main(["evaluate", "f"])
    origin = yaml.safe_load(Path("results/f/config.yaml").read_text())["made_by"]["weights"]
    assert origin == {
        "source": "vit.safetensors",
        "sha256": hashlib.sha256(Path("vit.safetensors").read_bytes()).hexdigest(),
        "mean": [0.485, 0.456, 0.406],  # ImageNet's, since layer scale means DINOv2 or DeiT III
        "std": [0.229, 0.224, 0.225],
    }
    assert "test loss" in capsys.readouterr().out
