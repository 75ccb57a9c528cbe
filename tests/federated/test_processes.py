"""Processes that share a run: the same bits as one, and a clean end where one is lost."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main
from fedtalos.experiments import federated
from fedtalos.training.federated.processes import WorkerLostError

FEDERATED = shlex.split(
    "federated --dataset digits --model_size micro --image_size 8 --patch_size 4 --eval_limit 40 --eval_batch_size 16 "
    "--weights none --train_limit 300 --num_clients 6 --client_fraction 0.5 --num_rounds 3 --local_steps 2 "
    "--batch_size 16 --eval_every 2 --threads 1 --device cpu --precision fp32"
)

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


def rows(run: str) -> list[list[str]]:
    with Path("results", run, "metrics.csv").open() as lines:
        return [row[:-1] for row in csv.reader(lines)]


def assert_same(first: str, second: str) -> None:
    assert rows(first) == rows(second)
    tensors = [load_checkpoint(Path("checkpoints", run, "last.json")).tensors for run in (first, second)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.fixture
def alone() -> str:
    main([*FEDERATED, "--run_name", "alone"])
    return "alone"


@pytest.mark.parametrize("workers", [2, 4])
def test_many_workers_equal_one_bit_for_bit(alone, workers):
    main([*FEDERATED, "--run_name", "many", "--workers", str(workers)])
    assert_same(alone, "many")


def test_processes_of_torchrun_equal_one_bit_for_bit(alone):
    program = "from fedtalos.cli import main; main()"
    Path("run.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "run.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *FEDERATED, "--run_name", "many"], check=True, env=environment, capture_output=True)
    assert_same(alone, "many")


@pytest.mark.parametrize(
    "options",
    [
        "--algorithm scaffold --optimizer sgd",
        "--head ridge --trainable blocks --freeze_head",  # which the leader fits
        "--on_bad_client skip --attack nan --attackers 2 --algorithm fedadam",
    ],
)
def test_what_clients_are_sent_and_send_back_travels(options):
    for name, workers in (("alone", "1"), ("many", "2")):
        main([*FEDERATED, *shlex.split(options), "--eval_every", "1", "--run_name", name, "--workers", workers])
    assert_same("alone", "many")


def test_training_that_fails_in_a_worker_is_said_as_anywhere(capsys):
    with pytest.raises(SystemExit, match="1"):
        main([*FEDERATED, "--workers", "3", "--learning_rate", "1e15", "--clip_norm", "None", "--optimizer", "sgd"])
    assert "round 1, client" in capsys.readouterr().err


def test_bad_input_is_said_once_and_leaves_no_process(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*FEDERATED, "--workers", "2", "--num_clients", "5000"])
    assert capsys.readouterr().err.count("--num_clients") == 1


def children_of(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_what_a_lost_worker_cannot_evaluate_the_leader_does(alone, monkeypatch):
    def lost(*_):
        raise WorkerLostError("gone")

    monkeypatch.setattr(federated, "evaluate_in_processes", lost)
    main([*FEDERATED, "--run_name", "many", "--workers", "2"])
    assert_same(alone, "many")


WAITS_IN_ROUND_2 = """
import time
from pathlib import Path
from fedtalos.app.run.recorder import Recorder
from fedtalos.cli import main

record = Recorder.record

def waiting(self, step, *figures, **others):
    record(self, step, *figures, **others)
    if step == 2:
        Path("waits").touch()
        while not Path("go").exists():
            time.sleep(0.01)

Recorder.record = waiting
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ps --ppid is of Linux")
@pytest.mark.parametrize("lost", ["worker", "leader"])
def test_a_lost_process_ends_the_run_which_resumes_to_the_same_end(lost):
    temporary = Path("temporary").absolute()
    temporary.mkdir()
    command = [*FEDERATED, "--num_rounds", "12"]
    main([*command, "--run_name", "alone"])
    run = subprocess.Popen(
        [sys.executable, "-c", WAITS_IN_ROUND_2, *command, "--workers", "2", "--run_name", "lost"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    while not Path("waits").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    workers = children_of(run.pid)
    assert len(workers) == 1
    os.kill(workers[0] if lost == "worker" else run.pid, signal.SIGKILL)
    Path("go").touch()
    _, said = run.communicate()
    if lost == "worker":
        assert run.returncode == 1
        assert "worker 1 was killed by signal 9" in said
        assert "--resume --run_name lost" in said
        assert said.startswith("fedtalos: ")
        assert said.count("\n") == 1  # nothing of torch's own, and no traceback
    while Path(f"/proc/{workers[0]}").exists():  # for ever, if it outlives its leader
        time.sleep(0.05)
    assert not list(temporary.glob("fedtalos-*"))
    main(["federated", "--resume", "--run_name", "lost", "--workers", "1"])
    assert_same("alone", "lost")
