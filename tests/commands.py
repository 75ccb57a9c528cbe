"""Commands as tests run them: small, refused in one line, or stopped in the middle."""

import csv
import shlex
from pathlib import Path

import pytest
import yaml

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


def outcome() -> dict[str, object]:
    """Everything that runs left in this folder, but for what tells the time or the folder's place."""
    found: dict[str, object] = {}
    for path in sorted(Path().glob("*/**/*")):
        if path.suffix == ".csv":
            with path.open() as lines:
                rows = csv.DictReader(lines)
                found[str(path)] = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]
        elif path.name == "summary.yaml":
            summary = yaml.safe_load(path.read_text())
            of_the_machine = ("seconds", "evaluation_share", "energy_wh")
            found[str(path)] = {k: v for k, v in summary.items() if k not in of_the_machine}
        elif path.suffix == ".safetensors":
            found[str(path)] = path.read_bytes()
        elif path.is_file() and path.suffix not in (".yaml", ".json", ".md", ".png", ".html") and path.name != ".lock":
            found[str(path)] = path.stat().st_size
    return found
