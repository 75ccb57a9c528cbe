"""Commands as tests run them: small, refused in one line, or stopped in the middle."""

import shlex

import pytest

from fedtalos.cli import main
from fedtalos.training import local_training

SMALL = shlex.split(
    "--dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --device cpu --train_limit 60 "
    "--eval_limit 20"
)
CENTRALIZED = ["centralized", *SMALL, "--num_epochs", "1"]


def refused(arguments: list[str], capsys) -> str:
    """The one line that refuses a command, which exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    says = capsys.readouterr().err
    assert "Traceback" not in says
    assert len(says.splitlines()) == 1
    return says


def interrupt_after(monkeypatch, calls: int) -> None:
    """Let somebody ask twice to stop when training is called once more than so many times."""
    original, seen = local_training.train, []

    def train(*args, **kwargs):
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(local_training, "train", train)
