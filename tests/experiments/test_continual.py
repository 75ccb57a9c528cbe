"""One task after another, by command: courses, repeatable and resumed."""

import csv
from pathlib import Path

import pytest
import yaml
from commands import SMALL, interrupt_after, refused

from fedtalos.cli import main

COMMAND = [
    *("continual", *SMALL, "--num_clients", "4", "--tasks", "2", "--num_rounds", "2", "--client_fraction", "0.5"),
    *("--local_steps", "2", "--batch_size", "8", "--threads", "1", "--merge_alpha", "0.5"),
]

pytestmark = pytest.mark.usefixtures("without_figures")


def courses(name: str) -> list[dict[str, str]]:
    with Path("results", name, "continual.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_courses_of_every_row_repeat_and_go_on_where_they_were_stopped(monkeypatch):
    main([*COMMAND, "--run_name", "whole"])
    rows = courses("whole")
    assert [(row["row"], row["head"], row["after"]) for row in rows] == [
        (rule, head, task)
        for rule in ("sequential", "magmax", "sum")
        for head in ("first", "refitted")
        for task in ("task0", "task1")
    ]
    of_row = {row["row"]: row for row in rows if row["after"] == "task0" and row["head"] == "refitted"}
    assert all(row["task1"] == "0.000000" for row in of_row.values())  # no client of it has sent anything yet
    assert of_row["magmax"] == of_row["sum"] | {"row": "magmax"}  # one vector, by any rule
    summary = yaml.safe_load(Path("results/whole/summary.yaml").read_text())
    assert summary["rounds"] == 8
    last = [row for row in rows if row["row"] == "sequential" and row["head"] == "first"]
    figures = summary["continual"]["sequential"]["first"]
    assert figures["average_accuracy"] == pytest.approx(
        (float(last[1]["task0"]) + float(last[1]["task1"])) / 2, abs=1e-5
    )
    assert figures["backward_transfer"] == pytest.approx(float(last[1]["task0"]) - float(last[0]["task0"]), abs=1e-5)
    for calls in (3, 5):  # in the second task's, and in the first of those that train apart
        name = f"stopped{calls}"
        with monkeypatch.context() as patched:
            interrupt_after(patched, calls)
            with pytest.raises(SystemExit):
                main([*COMMAND, "--run_name", name])
        main(["continual", "--resume", "--run_name", name])
        assert courses(name) == rows


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected --tasks T"),
        (["--tasks", "2", "--one_shot"], "is of federated"),
        (["--tasks", "2", "--merge", "ties"], "is of federated"),
        (["--tasks", "11", "--num_clients", "20"], "11 groups of 10 classes"),
    ],
)
def test_courses_that_cannot_be_are_refused(in_a_folder_of_its_own, capsys, words, says):
    assert says in refused(["continual", *SMALL, *words], capsys)
    assert not Path("checkpoints").exists()
