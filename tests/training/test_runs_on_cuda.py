"""Commands on a card: the same bits again, and after an interruption. (Elsewhere commands are tested on the CPU.)"""

import shlex
from pathlib import Path

import pytest
from commands import outcome

from fedtalos.app.run.books import Books
from fedtalos.app.run.recorder import Recorder
from fedtalos.cli import main

SMALL = "--dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --run_name run "
SMALL += "--train_limit 200 --eval_limit 40 --resume_or_start --device "
FEDERATED = (
    "federated --num_rounds 5 --num_clients 6 --client_fraction 0.5 --batch_size 16 --eval_every 1 --head ridge "
)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    "command",
    [
        "centralized --num_epochs 4 --batch_size 32 --eval_every 1 ",
        FEDERATED,
        FEDERATED + "--algorithm scaffold --freeze_head ",
        FEDERATED.replace("--num_rounds 5", "--one_shot").replace("--client_fraction 0.5", "") + "--local_epochs 1 ",
        "editing --num_iterations 3 --calibration federated --num_clients 6 --head ridge --calibration_images 60 ",
    ],
)
def test_a_run_on_a_card_is_the_same_again_and_after_an_interruption(command, device, tmp_path, monkeypatch):
    if device.type == "cpu":
        pytest.skip("needs CUDA")
    command, found = shlex.split(command + SMALL + device.type), []
    for place in ("once", "again", "interrupted"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        if place == "interrupted":
            with monkeypatch.context() as patched:
                interrupt_at_the_second(patched, Books if command[0] == "editing" else Recorder)
                with pytest.raises(SystemExit, match="130"):
                    main(command)
            assert list(Path("checkpoints/run").glob("last-*.safetensors"))
        main(command)
        found.append(outcome())
    assert found[0] == found[1] == found[2]


def interrupt_at_the_second(monkeypatch, owner) -> None:
    """Break off when something is recorded for the second time."""
    original, seen = owner.record, []

    def record(*args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, "record", record)
