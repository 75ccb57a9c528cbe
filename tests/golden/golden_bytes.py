"""Short digits runs whose metrics, masks and checkpoints must stay the same to the byte.

    python tests/golden/golden_bytes.py          say which runs differ from golden_bytes.json
    python tests/golden/golden_bytes.py --write  write it anew (and say why in the commit's message)

Other processors and other versions of torch add in another order, so the file also names the arithmetic that it was
made with.
"""

import csv
import hashlib
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fedtalos.cli import main

GOLDEN = Path(__file__).with_name("golden_bytes.json")

SHARED = (
    "--dataset digits --image_size 8 --device cpu --precision fp32 --threads 1 --train_limit 400 --eval_limit 100 "
    "--calibration_fraction 0.1"
)
SCRATCH = "--model_size micro --patch_size 2 --weights none"
ROUNDS = (
    "--weights central --head weights --num_clients 10 --num_rounds 3 --client_fraction 0.4 --local_steps 2 "
    "--batch_size 16 --eval_every 1 --partition label_skew --classes_per_client 3"
)
EDIT = "--calibration_images 48 --num_iterations 2"
RUNS = {
    "central": f"centralized {SCRATCH} --num_epochs 2 --batch_size 50 --augmentation crop_flip",
    "edit": f"editing --checkpoint central {EDIT}",
    "edit_ridge": f"editing --weights central --head ridge --criterion most_sensitive {EDIT}",
    "edit_clients": f"editing --checkpoint central {EDIT} --calibration federated --num_clients 5",
    "edit_rows": f"editing --checkpoint central {EDIT} --eligible qk --granularity row --target_sparsity 0.7",
    "central_mask": "centralized --weights central --mask masks/edit.safetensors --num_epochs 1",
    "probe": "centralized --weights central --head linear --head_rounds 2 --trainable head --num_epochs 1",
    "dense": f"federated {ROUNDS}",
    "mask": f"federated {ROUNDS} --mask masks/edit.safetensors",
    "rows": f"federated {ROUNDS} --mask masks/edit_rows.safetensors --optimizer sgd",
    "ridge": f"federated {ROUNDS} --head ridge --freeze_head --mask masks/edit.safetensors",
    "linear": f"federated {ROUNDS} --head linear --head_rounds 2",
    "fedprox": f"federated {ROUNDS} --mask masks/edit.safetensors --algorithm fedprox",
    "fedavgm": f"federated {ROUNDS} --algorithm fedavgm --server_learning_rate 0.5",
    "fedadam": f"federated {ROUNDS} --algorithm fedadam",
    "scaffold": f"federated {ROUNDS} --mask masks/edit.safetensors --algorithm scaffold --optimizer sgd --num_rounds 5",
    "fednova": "federated --weights central --head weights --num_clients 10 --num_rounds 3 --client_fraction 0.4 "
    "--batch_size 16 --eval_every 1 --partition dirichlet --local_epochs 1 --algorithm fednova --optimizer sgd",
    "krum": f"federated {ROUNDS} --client_fraction 0.6 --aggregation krum --max_update_norm 1 --attack nan "
    "--attackers 3",
    "failures": f"federated {ROUNDS} --dropout_rate 0.3 --slowest 4 --deadline 5 --on_bad_client skip",
    "private": f"federated {ROUNDS} --max_update_norm 0.1 --dp_noise 1 --dp_delta 0.01",
    "personal": f"federated {ROUNDS} --mask masks/edit.safetensors --client_evaluation --personalise_steps 2 "
    "--personalise_clients 3",
    "together": f"federated {ROUNDS} --mask masks/edit.safetensors --clients_at_once 2",
    "workers": f"federated {ROUNDS} --mask masks/edit.safetensors --algorithm scaffold --workers 2",
}
CELL = "digits-nc2-mask-s0"


def make_runs() -> dict[str, dict[str, str]]:
    """Make every run in the working folder; returns each one's checksums."""
    for name, command in RUNS.items():
        kind, *rest = shlex.split(command)
        main([kind, *shlex.split(SHARED), *last_wins(rest), "--run_name", name])
    main(["sweep", "digits", "--only", CELL, "--threads", "1", "--device", "cpu", "--precision", "fp32"])
    return {name: checksums(name) for name in (*RUNS, CELL)}


def last_wins(words: list[str]) -> list[str]:
    """The options with each one's last value, so that a run can restate one of ROUNDS."""
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            options.pop(word, None)
            options[word] = []
        else:
            options[next(reversed(options))].append(word)
    return [word for flag, values in options.items() for word in (flag, *values)]


def checksums(name: str) -> dict[str, str]:
    """Checksums of what the run left: figures without times, mask bits, checkpoints' tensors."""
    found = {}
    for table in ("metrics.csv", "iterations.csv", "clients.csv", "report.csv", "client_accuracy.csv"):
        path = Path("results", name, table)
        if path.exists():
            rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
            plain = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
            found[table] = digest(repr(plain).encode())
    files = {"mask": Path("masks", f"{name}.safetensors"), "head": Path("masks", f"{name}.head.safetensors")}
    files |= {
        which: next(Path("checkpoints", name).glob(f"{which}-*.safetensors"), Path()) for which in ("last", "best")
    }
    return found | {what: tensors_digest(path) for what, path in files.items() if path.is_file()}


def tensors_digest(path: Path) -> str:
    """Checksum of the tensors by name; the file's header may say other things."""
    tensors = sorted(load_file(path).items())
    return digest(b"".join(name.encode() + tensor.contiguous().numpy().tobytes() for name, tensor in tensors))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def arithmetic() -> str:
    """Checksum of a few steps of plain torch: where it differs, every run does."""
    torch.set_num_threads(1)
    numbers = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=numbers) for shape in ((50, 17, 96), (288, 96)))
    weight.requires_grad_()
    for _ in range(3):
        q, k, v = F.layer_norm(F.linear(x, weight), (288,)).view(50, 17, 3, 3, 32).permute(2, 0, 3, 1, 4)
        F.gelu(F.scaled_dot_product_attention(q, k, v)).softmax(-1).square().sum().backward()
        with torch.no_grad():
            weight -= weight.grad
    return f"torch {torch.__version__.partition('+')[0]}, {digest(weight.detach().numpy().tobytes())}"


def run() -> None:
    write = "--write" in sys.argv
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = {"arithmetic": arithmetic(), "runs": make_runs()}
        os.chdir(here)
    if write:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if golden["arithmetic"] != found["arithmetic"]:
        print(f"made with {golden['arithmetic']}, here {found['arithmetic']}: bytes differ anyway")
    differ = [
        f"{name} {what}"
        for name, sums in golden["runs"].items()
        for what, value in sums.items()
        if found["runs"].get(name, {}).get(what) != value
    ]
    print("\n".join(differ) or "all the same")
    sys.exit(bool(differ))


if __name__ == "__main__":
    run()
