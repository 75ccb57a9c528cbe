"""The way from the command line to the gradient: `python tests/experiments/test_calls.py` prints it."""

import inspect
import shlex
import tempfile
from pathlib import Path

import pytest
import torch

from fedtalos.cli import main

COMMAND = shlex.split(
    "federated --dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --train_limit 100 "
    "--eval_limit 20 --num_clients 2 --num_rounds 1 --local_steps 1 --batch_size 8 --device cpu"
)
MOST = 9


def walk(folder: Path) -> list[str]:
    """Names of the functions from cli.main to loss.backward(), both included."""
    found: list[str] = []
    backward = torch.Tensor.backward

    def noting(tensor: torch.Tensor) -> None:
        ours = [frame for frame in inspect.stack() if "/fedtalos/" in frame.filename]
        names = [f"{Path(frame.filename).stem}.{frame.function}" for frame in reversed(ours)]
        found[:] = found or [*names, "loss.backward"]
        backward(tensor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "backward", noting)
        main([*COMMAND, "--output_dir", str(folder)])
    return found


@pytest.mark.usefixtures("without_figures")
def test_nine_calls_from_main_to_the_gradient(tmp_path):
    calls = walk(tmp_path)
    assert calls[0] == "cli.main"
    assert len(calls) <= MOST, calls


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(walk(Path(folder))))  # noqa: T201
