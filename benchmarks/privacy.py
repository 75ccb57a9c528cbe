"""What a mask buys under differential privacy, on digits: python benchmarks/privacy.py (about two minutes, one thread).

A micro ViT that was trained on 200 public digits is fine-tuned by 250 clients of about 4 images, 50 a round, with equal
clip, noise and rounds, so equal epsilon: all of it, a TaLoS mask's entries, or the head. Beside it: without noise.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from measure import environment, markdown_table
from rich.console import Console

from fedtalos.cli import parse
from fedtalos.config import RunConfig
from fedtalos.experiments import centralized, editing, federated
from fedtalos.experiments.runs import choose_run

ROUNDS, CLIP, NOISE, SEEDS = 8, 0.1, 2.0, (0, 1, 2)
COMMON = "--dataset digits --calibration_fraction 0.1 --model_size micro --image_size 8 --patch_size 4 --threads 1 "
COMMON += "--device cpu --precision fp32 "
FEDERATED = f"federated {COMMON} --weights public --train_skip 200 --num_clients 250 --client_fraction 0.2 "
FEDERATED += f"--num_rounds {ROUNDS} --eval_every {ROUNDS} --local_steps 1 --batch_size 4 --clients_at_once 50 "
FEDERATED += f"--max_update_norm {CLIP} "
ARMS = {
    "everything": "--learning_rate 1e-3",
    "mask at 0.9": "--mask masks/mask90.safetensors --learning_rate 3e-3",
    "mask at 0.99": "--mask masks/mask99.safetensors --learning_rate 1e-2",
    "the head": "--trainable head --learning_rate 1e-2",
}


def summary(command: str, name: str) -> dict:
    """What a run's summary says; without figures, which would take longer than the run."""
    config = parse([*shlex.split(command), "--run_name", name])
    assert isinstance(config, RunConfig)
    experiment = {"centralized": centralized, "federated": federated, "editing": editing}[config.command]
    return experiment.run(config, choose_run(config), Console(stderr=True))


def accuracies(arm: str, options: str) -> tuple[list[float], dict]:
    """Test accuracy (%) of every seed, and the last one's summary."""
    name = arm.replace(" ", "-") + ("-private" if options else "")
    found = [summary(f"{FEDERATED} {ARMS[arm]} {options} --seed {seed}", f"{name}-{seed}") for seed in SEEDS]
    return [100 * one["test_accuracy"]["last"] for one in found], found[-1]


def measure() -> str:
    """The page."""
    public = summary(
        f"centralized {COMMON} --weights none --train_limit 200 --num_epochs 15 --eval_every 15 --batch_size 32",
        "public",
    )
    for name, sparsity in {"mask90": 0.9, "mask99": 0.99}.items():
        summary(f"editing {COMMON} --weights public --target_sparsity {sparsity}", name)
    rows = []
    for arm in ARMS:
        plain, _ = accuracies(arm, "")
        private, last = accuracies(arm, f"--dp_noise {NOISE}")
        entries = last["moving_parameters"]
        noise = NOISE * CLIP * entries**0.5 / 50
        shown = [f"{mean(values):.1f} ± {stdev(values):.1f}" for values in (plain, private)]
        rows.append((arm, entries, f"{noise:.2f}", *shown))
    spent = last["privacy"]
    header = ("what moves", "entries", "norm of a round's noise", "test accuracy, no noise (%)", "with noise (%)")
    return (
        f"{environment()}; {ROUNDS} rounds, clip {CLIP}, z {NOISE}: epsilon {spent['epsilon']:.1f} at delta "
        f"{spent['delta']:g} (replace one client); {100 * public['test_accuracy']['last']:.1f} % before; "
        f"mean ± deviation over {len(SEEDS)} seeds\n\n{markdown_table(header, rows)}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    page = Path(__file__).resolve().with_name("results") / "privacy.md"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text = measure()
    page.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
