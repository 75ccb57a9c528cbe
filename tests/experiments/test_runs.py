"""Runs on disk: which are running, how far they are, followed from elsewhere, and compared."""

import time
from pathlib import Path

import pytest
import yaml
from commands import CENTRALIZED, SMALL, refused

from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.runs import comparable, read_run
from fedtalos.cli import main
from fedtalos.files import locked

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")

HEADER = "round,split,loss,accuracy,examples,learning_rate,bytes_down,bytes_up,seconds\n"


def made(name: str, rounds: int = 3, *, finished: bool = True, **options: object) -> RunPaths:
    """Records of a federated run of ten rounds, a second each, of which so many are done."""
    paths = RunPaths(Path(), name)
    paths.results.mkdir(parents=True)
    config = {"command": "federated", "dataset": "digits", "num_rounds": 10, "seed": 0, **options}
    paths.config.write_text(yaml.safe_dump(config))
    lines = [HEADER]
    for at in range(1, rounds + 1):
        lines.append(f"{at},train,{2 / at},0.5,64,0.01,{at}000000,{at}000000,{at + 1}.0\n")
        lines.append(f"{at},val,1.0,{0.6 + at / 100},50,,{at}000000,{at}000000,{at + 1}.0\n")
    if finished:
        lines.append(f"{rounds},test,1.0,0.6,100,,{rounds}000000,{rounds}000000,{rounds + 1}.0\n")
        (paths.results / "summary.yaml").write_text("command: federated\n")
    (paths.results / "metrics.csv").write_text("".join(lines))
    return paths


def said(words: list[str], capsys) -> str:
    capsys.readouterr()
    main(words)
    return capsys.readouterr().out


def test_a_run_is_finished_or_stopped_or_running_while_somebody_holds_its_lock():
    done, part = made("done"), made("part", finished=False)
    assert read_run(done).state == "finished"
    assert read_run(part).state == "stopped"
    with locked(part.lock):
        run = read_run(part)
    assert (run.state, run.done, run.total) == ("running", 3, 10)
    assert run.left == pytest.approx(7.0)
    assert run.best == pytest.approx(0.63)
    assert read_run(part).state == "stopped"


def test_looking_at_a_lock_keeps_nobody_from_taking_it():
    paths = made("part", finished=False)
    with locked(paths.lock):
        pass
    for _ in range(3):
        assert read_run(paths).state == "stopped"
        with locked(paths.lock):
            assert read_run(paths).state == "running"


def test_a_line_that_is_being_written_is_passed_over():
    paths = made("part", finished=False)
    with (paths.results / "metrics.csv").open("a") as file:
        file.write("4,train,0.1,0.9,64,0.0")
    assert read_run(paths).done == 3


@pytest.mark.parametrize("content", ["", "{", "- 1\n", "command: federated\nnum_rounds: many\n", "\0"])
def test_one_broken_run_does_not_hide_the_others(content, capsys):
    made("good")
    made("bad").config.write_text(content)
    out = said(["runs"], capsys)
    assert "good" in out
    if content:
        assert "broken" in out


def test_runs_and_status_list_the_newest_first(capsys):
    for number, name in enumerate(("first", "second")):
        made(name)
        time.sleep(0.01 * number)
    out = said(["runs"], capsys)
    assert out == said(["status"], capsys)
    names = [line.split()[0] for line in out.splitlines()[2:]]
    assert names == ["second", "first"]
    assert "3/10" in out
    assert "63.0 %" in out
    assert "60.0 %" in out
    assert "first" not in said(["status", "second"], capsys)


def test_no_runs_and_unknown_ones_are_said(capsys):
    assert "no runs in results" in said(["runs"], capsys)
    made("dense")
    assert "did you mean 'dense'?" in refused(["runs", "dens"], capsys)
    assert "--follow: expected the name of a run; running are: none" in refused(["status", "--follow"], capsys)
    made("other")
    assert "expected one run, got 2" in refused(["status", "dense", "other", "--follow"], capsys)


def test_a_run_is_found_by_any_of_its_folders(monkeypatch, capsys):
    made("dense")
    for word in ("dense", "results/dense", "results/dense/", "checkpoints/dense", str(Path("results/dense").resolve())):
        assert "dense" in said(["status", word], capsys)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for words in (["dense", "--output_dir", ".."], ["../results/dense"]):
        assert "dense" in said(["status", *words], capsys)
    Path("config.yaml").write_text("command: federated\n")
    assert "no such run" in refused(["status", "."], capsys)


def test_many_runs_are_listed_in_part(capsys):
    for number in range(23):
        made(f"r{number}")
    assert "3 older runs; --all lists them too" in said(["runs"], capsys)
    assert said(["runs", "--all"], capsys).count("federated") == 23


def test_a_run_is_followed_to_its_end(monkeypatch, capsys):
    paths = made("part", finished=False)
    held, later = locked(paths.lock), iter("...")

    def sleep(_seconds: float) -> None:
        if next(later, None) is None:
            held.__exit__(None, None, None)
            return
        with (paths.results / "metrics.csv").open("a") as file:
            done = read_run(paths).done + 1
            file.write(f"{done},train,0.25,0.9,64,0.01,0,0,{done + 1}.0\n")

    monkeypatch.setattr("fedtalos.experiments.runs.time.sleep", sleep)
    held.__enter__()
    out = said(["status", "--follow"], capsys)
    lines = [line for line in out.splitlines() if line.startswith("part: ")]
    assert [line.partition(",")[0] for line in lines] == [f"part: round {done}/10" for done in (3, 4, 5, 6)]
    assert lines[-1].endswith("loss 0.250, best 63.0 %, 4.0 s left")
    assert "stopped" in out.splitlines()[-1]


# compare


def test_figures_and_options_that_differ_are_printed(capsys):
    made("dense", learning_rate=0.1, mask=None, run_name="dense")
    made("sparse", learning_rate=0.3, mask="m.safetensors", run_name="sparse")
    out = said(["compare", "dense", "results/sparse"], capsys)
    assert "60.0 % (50.2 to 69.1)" in out
    assert "6.0 MB" in out
    table = dict(line.split(None, 1) for line in out.partition("Made differently")[2].splitlines()[1:])
    assert table == {"learning_rate": "0.1 (1); 0.3 (2)", "mask": "none (1); m.safetensors (2)"}
    assert max(map(len, out.splitlines())) <= 80


def test_options_of_one_command_alone_are_not_differences(capsys):
    made("a", learning_rate=0.1)
    made("b", command="centralized", learning_rate=0.3, num_epochs=5)
    made("c", learning_rate=0.1, algorithm="fedadam")  # a record of an earlier version may lack an option
    table = said(["compare", "a", "b"], capsys).partition("Made differently")[2].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["command", "learning_rate"]
    assert "algorithm  none (1); fedadam (2)" in said(["compare", "a", "c"], capsys)


def test_what_cannot_be_compared_is_refused(capsys):
    made("a")
    made("b", dataset="cifar10")
    made("e").config.write_text("command: editing\nnum_iterations: 4\ndataset: digits\n")
    assert "a is of digits and b of cifar10" in refused(["compare", "a", "b"], capsys)
    assert "expected two or more runs, got 1" in refused(["compare", "a"], capsys)
    assert "got one of them twice" in refused(["compare", "a", "results/a"], capsys)
    assert "`fedtalos mask compare`" in refused(["compare", "a", "e"], capsys)
    assert "no such run" in refused(["compare", "a", "zzz"], capsys)


def test_a_run_is_compared_with_the_newest_of_the_same_images():
    paths = made("a")
    made("older")
    made("b", dataset="cifar10")
    assert comparable(paths) == "older"
    made("open", finished=False)
    assert comparable(paths) == "older"
    assert comparable(RunPaths(Path(), "b")) is None


# what a run says


def test_a_run_says_what_it_is_and_what_it_reached(capsys):
    out = said([*CENTRALIZED, "--run_name", "a"], capsys)
    for fact in (
        "device  cpu, fp32, 1 thread",
        "data    digits (10 classes): train 60, val 20, calibration 26, test 20",
        "model   ViT-micro/4 at 8 px, 0.68 million parameters, from scratch",
        "moves   everything",
        "head    random; moves",
        "start: validation accuracy ",
        "in brackets  95 % interval, by the 20 and 20 images",
        "next:",
    ):
        assert fact in out
    (test,) = [line for line in out.splitlines() if line.startswith("test ")]
    assert " % (" in test
    assert "test_accuracy" not in out
    assert max(map(len, out.partition("next:")[0].splitlines()[2:-3])) <= 110
    again = said([*CENTRALIZED, "--run_name", "b", "--seed", "1"], capsys)
    assert "fedtalos compare a b " in again


def test_a_federated_run_says_who_trains_and_what_is_sent(capsys):
    clients = ["--num_clients", "4", "--client_fraction", "0.5", "--num_rounds", "2", "--local_steps", "1"]
    words = ["federated", *SMALL, *clients, "--batch_size", "8", "--trainable", "head", "--run_name", "a"]
    out = said(words, capsys)
    assert "clients  4, IID, 15 images each; 2 in a round, 1 step of 8" in out
    assert "entries, 0.1 % (--trainable head)" in out
    assert "sends    0.0 MB down and 0.0 MB up in a round, 0.0 MB in all" in out
    assert "sent         0.0 MB down, 0.0 MB up, all clients together" in out
