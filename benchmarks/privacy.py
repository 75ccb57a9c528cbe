"""What a mask buys under differential privacy, on digits: python benchmarks/privacy.py [FOLDER] (runs stay there).

A micro ViT that was trained on 200 public digits is fine-tuned by 250 clients of about 4 images, 50 a round, with equal
clip, noise and rounds, so equal epsilon: all of it, a TaLoS mask's entries, or the head. Beside it: without noise.
"""

import os
import shlex
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from measure import environment, markdown_table

from fedtalos.app.config.files import read_yaml
from fedtalos.app.figures import draw
from fedtalos.cli import main

ROUNDS, CLIPS, NOISE, SEEDS = 8, (0.5, 0.1), 2.0, (0, 1, 2)
COMMON = "--dataset digits --calibration_fraction 0.1 --model_size micro --image_size 8 --patch_size 4 --threads 1 "
COMMON += "--device cpu --precision fp32 "
FEDERATED = f"federated {COMMON} --weights public --train_skip 200 --num_clients 250 --client_fraction 0.2 "
FEDERATED += f"--num_rounds {ROUNDS} --eval_every {ROUNDS} --local_steps 1 --batch_size 4 --clients_at_once 50 "
ARMS = {
    "everything": "--learning_rate 1e-3",
    "mask at 0.9": "--mask masks/mask90.safetensors --learning_rate 3e-3",
    "the head": "--trainable head --learning_rate 1e-2",
}


def summary(command: str, name: str) -> dict[str, Any]:
    """What a run's summary says; of one that is there already, without running it again."""
    path = Path("results", name, "summary.yaml")
    if not path.exists():
        main([*shlex.split(command), "--run_name", name])
    return read_yaml(path)


def runs(arm: str, clip: float, noise: float) -> list[dict[str, Any]]:
    """The summaries of all seeds."""
    options = f"{ARMS[arm]} --max_update_norm {clip}" + (f" --dp_noise {noise}" if noise else "")
    name = f"{arm.replace(' ', '-')}-{clip}-{noise}"
    return [summary(f"{FEDERATED} {options} --seed {seed}", f"{name}-{seed}") for seed in SEEDS]


def shown(found: list[dict[str, Any]]) -> str:
    """Test accuracy, mean ± deviation."""
    values = [100 * one["test_accuracy"]["last"] for one in found]
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def measure() -> str:
    """The page."""
    pretraining = "--weights none --train_limit 200 --num_epochs 15 --eval_every 15 --batch_size 32"
    public = summary(f"centralized {COMMON} {pretraining}", "public")
    summary(f"editing {COMMON} --weights public --target_sparsity 0.9", "mask90")
    rows = []
    for arm, clip in product(ARMS, CLIPS):
        private = runs(arm, clip, NOISE)
        entries, spent = private[0]["moving_parameters"], private[0]["privacy"]
        norm = NOISE * clip * entries**0.5 / 50
        rows.append((arm, entries, clip, f"{norm:.2f}", shown(runs(arm, clip, 0)), shown(private)))
    header = ("what moves", "entries", "S", "norm of a round's noise", "test accuracy, no noise (%)", "with noise (%)")
    return (
        f"{environment()}; {ROUNDS} rounds, z {NOISE}: epsilon {spent['epsilon']:.1f} at delta {spent['delta']:g} "
        f"(replace one client); {100 * public['test_accuracy']['last']:.1f} % before; mean ± deviation over "
        f"{len(SEEDS)} seeds\n\n{markdown_table(header, rows)}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw.plot_run = draw.plot_masks = draw.plot_iterations = lambda *_: []  # figures would take longer than the runs
    page = Path(__file__).resolve().with_name("results") / "privacy.md"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(sys.argv[1] if sys.argv[1:] else folder)
        text = measure()
    page.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
