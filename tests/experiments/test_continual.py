"""One task after another, by command: courses, repeatable and resumed."""

import csv
from pathlib import Path

import pytest
import yaml
from commands import SMALL, interrupt_after, refused

import fedtalos as ft
from fedtalos.app.run.courses import read_courses
from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main
from fedtalos.errors import InputError

COMMAND = [
    *("continual", *SMALL, "--num_clients", "4", "--tasks", "2", "--num_rounds", "2", "--client_fraction", "0.5"),
    *("--local_steps", "2", "--batch_size", "8", "--threads", "1", "--merge_alpha", "0.5"),
]

pytestmark = pytest.mark.usefixtures("without_figures")


def courses(name: str) -> list[dict[str, str]]:
    with Path("results", name, "continual.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_courses_of_every_row_repeat_and_go_on_where_they_were_stopped(monkeypatch, capsys):
    main([*COMMAND, "--run_name", "whole"])
    rows = courses("whole")
    found = read_courses(Path("results/whole"))
    assert list(found) == [(rule, head) for rule in ("sequential", "magmax", "sum") for head in ("first", "refitted")]
    first = {row: found[row, "refitted"].accuracy[0] for row in ("sequential", "magmax", "sum")}
    assert all(accuracy[1] == 0 for accuracy in first.values())  # no client of it has sent anything yet
    assert (first["magmax"] == first["sum"]).all()  # one vector, by any rule
    tasks = [ft.load_vector(Path(f"vectors/whole.{name}1.safetensors")).facts.task for name in ("task", "after-task")]
    assert tasks == [tuple("56789"), tuple("0123456789")]
    summary = yaml.safe_load(Path("results/whole/summary.yaml").read_text())
    assert summary["rounds"] == 8
    accuracy = found["sequential", "first"].accuracy
    figures = summary["continual"]["sequential"]["first"]
    assert figures["average_accuracy"] == pytest.approx(accuracy[1].mean(), abs=1e-5)
    assert figures["backward_transfer"] == pytest.approx(accuracy[1, 0] - accuracy[0, 0], abs=1e-5)
    main(["evaluate", "whole"])
    tested = f"accuracy {100 * summary['test_accuracy']['last']:.2f} %"
    assert tested in capsys.readouterr().out
    for calls in (3, 5):  # in the second task's, and in the first of those that train apart
        name = f"stopped{calls}"
        with monkeypatch.context() as patched:
            interrupt_after(patched, calls)
            with pytest.raises(SystemExit):
                main([*COMMAND, "--run_name", name, "--eval_every", "1"])
        assert load_checkpoint(Path("checkpoints", name, "last.json")).facts["progress"]["done"] == calls
        main(["continual", "--resume", "--run_name", name])
        assert courses(name) == rows


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected --tasks T"),
        (["--tasks", "1"], "two or more"),
        (["--tasks", "2", "--one_shot"], "it is an option of federated"),
        (["--tasks", "2", "--merge", "ties"], "it is an option of federated"),
        (["--tasks", "2", "--client_evaluation"], "it is an option of federated"),
        (["--tasks", "11", "--num_clients", "20"], "11 groups of 10 classes"),
    ],
)
def test_courses_that_cannot_be_are_refused(in_a_folder_of_its_own, capsys, words, says):
    assert says in refused(["continual", *SMALL, *words], capsys)
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("words", [["continual", "--tasks", "2"], ["federated", "--one_shot"]])
def test_what_trains_apart_is_no_work_for_torchrun(in_a_folder_of_its_own, monkeypatch, capsys, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "runs in one process" in refused([*words, *SMALL, "--num_clients", "2"], capsys)


@pytest.mark.parametrize("lines", ["sequential,first,0,1,0.5", "sequential,first,0,0,1.5", "sum,third,0,0,0.5"])
def test_a_file_of_courses_that_lacks_a_cell_or_holds_another_is_refused(tmp_path, lines):
    (tmp_path / "continual.csv").write_text(f"row,head,after,task,accuracy\n{lines}\n")
    with pytest.raises(InputError, match=r"continual\.csv"):
        read_courses(tmp_path)
