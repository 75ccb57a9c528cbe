"""--early_stop: a run ends when validation gets no better, also one that is stopped and goes on."""

import csv
from pathlib import Path

import pytest
import yaml
from commands import SMALL, interrupt_after, refused

from fedtalos.cli import main

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")

STILL = ["--learning_rate", "1e-12", "--eval_every", "1", "--early_stop", "2"]  # nothing gets any better
CLIENTS = ["--num_clients", "3", "--client_fraction", "1", "--local_steps", "1", "--batch_size", "8"]
COMMANDS = {
    "centralized": ["centralized", *SMALL, "--num_epochs", "9", *STILL],
    "federated": ["federated", *SMALL, *CLIENTS, "--num_rounds", "9", *STILL],
}


def outcome(name: str) -> list[object]:
    """Rows without their times, the last tensors and the summary without its times."""
    with Path("results", name, "metrics.csv").open() as lines:
        rows = [row[:-1] for row in csv.reader(lines)]
    summary = yaml.safe_load(Path("results", name, "summary.yaml").read_text())
    summary = {key: value for key, value in summary.items() if key not in ("seconds", "evaluation_share")}
    (last,) = Path("checkpoints", name).glob("last-*.safetensors")
    return [rows, summary, last.read_bytes()]


@pytest.mark.parametrize("command", COMMANDS)
def test_it_ends_when_nothing_better_came_for_so_long(command, capsys):
    main([*COMMANDS[command], "--run_name", "a"])
    said = capsys.readouterr().out
    unit = "epoch" if command == "centralized" else "round"
    assert f"stopped early at {unit} 2 of 9: nothing better for 2 validations" in said
    assert yaml.safe_load(Path("results/a/summary.yaml").read_text())[f"{unit}s"] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_and_resumed_it_ends_with_the_same_bytes(command, monkeypatch):
    main([*COMMANDS[command], "--run_name", "whole"])
    with monkeypatch.context() as patched:  # while it trains
        interrupt_after(patched, 1 if command == "centralized" else 4)
        with pytest.raises(SystemExit, match="130"):
            main([*COMMANDS[command], "--run_name", "a"])
    with monkeypatch.context() as patched:  # when it had enough
        patched.setattr("fedtalos.app.run.session.Session.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="130"):
            main([command, "--resume", "--run_name", "a"])
    main([command, "--resume", "--run_name", "a"])
    assert outcome("a") == outcome("whole")


def test_a_run_that_gets_better_goes_on(capsys):
    words = [*COMMANDS["centralized"], "--learning_rate", "1e-3", "--num_epochs", "4", "--early_stop", "4"]
    main([*words, "--run_name", "a"])
    assert "stopped early" not in capsys.readouterr().out
    assert yaml.safe_load(Path("results/a/summary.yaml").read_text())["epochs"] == 4


def test_what_trains_apart_has_no_early_stop(capsys):
    words = [*COMMANDS["federated"], "--tasks", "2", "--early_stop", "3"]
    assert "--early_stop 3: what trains apart is validated when it is merged" in refused(words, capsys)
    assert "early_stop: input should be greater than or equal to 1" in refused(
        ["federated", "--early_stop", "0"], capsys
    )
