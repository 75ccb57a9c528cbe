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
from torch.distributed import distributed_c10d

from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main
from fedtalos.errors import TrainingError
from fedtalos.experiments import federated
from fedtalos.training.federated import processes
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


def test_three_workers_equal_one_bit_for_bit(alone):
    main([*FEDERATED, "--run_name", "many", "--workers", "3"])
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
        "--algorithm scaffold --optimizer sgd --on_bad_client skip --attack nan --attackers 2",
        "--head ridge --trainable blocks --freeze_head",  # which the leader fits
    ],
)
def test_what_clients_are_sent_and_send_back_travels_and_nothing_is_pickled(options, monkeypatch):
    for function in ("_object_to_tensor", "_tensor_to_object"):
        monkeypatch.setattr(distributed_c10d, function, lambda *_, **__: pytest.fail("a pickle"))
    for name, workers in (("alone", "1"), ("many", "2")):
        main([*FEDERATED, *shlex.split(options), "--eval_every", "1", "--run_name", name, "--workers", workers])
    assert_same("alone", "many")


@pytest.mark.parametrize(
    "options", ["--algorithm scaffold", pytest.param("--algorithm fedprox --prox_mu 1", marks=pytest.mark.slow)]
)
def test_corrected_clients_train_in_stacks_in_every_process(options):
    """Stacks are others with more processes, so sums are equal up to rounding."""
    for name, workers, size in (("alone", "1", "1"), ("many", "2", "3")):
        shared = ["--client_fraction", "1", "--workers", workers, "--clients_at_once", size]
        main([*FEDERATED, *shlex.split(options), "--optimizer", "sgd", *shared, "--run_name", name])
    alone, many = (load_checkpoint(Path("checkpoints", run, "last.json")).tensors for run in ("alone", "many"))
    for name, tensor in alone.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-4, atol=1e-5)
    assert not all(torch.equal(many[name], tensor) for name, tensor in alone.items())  # they were stacks


def test_messages_are_json_and_not_as_long_as_they_like():
    sent: list[torch.Tensor] = []
    words = ["train", 3, [0, 17], True]
    assert processes._words(words, sent.append) == words
    arriving = iter(sent)
    assert processes._words(None, lambda tensor: tensor.copy_(next(arriving))) == words
    for count in (-1, 0, processes.LONGEST + 1, 2**62):
        with pytest.raises(TrainingError, match=f"announced a message of {count} bytes"):
            processes._words(None, lambda tensor, count=count: tensor.fill_(count))


def test_bad_input_is_said_once_and_leaves_no_process(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*FEDERATED, "--workers", "2", "--num_clients", "5000"])
    assert capsys.readouterr().err.count("--num_clients") == 1


def listening(pids: list[int]) -> set[str]:
    """Addresses, in hexadecimal, that TCP sockets of these processes listen on."""
    sockets = {str(path.readlink()) for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir()}
    tables = [Path(f"/proc/{pids[0]}/net/{kind}") for kind in ("tcp", "tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


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
    assert listening([run.pid, *workers]) <= {"0100007F", "00000000000000000000000001000000"}  # loopback
    assert list(Path("results/lost").glob(".workers-*"))
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
    assert not list(temporary.iterdir())
    assert not list(Path("results/lost").glob(".workers-*"))
    main(["federated", "--resume", "--run_name", "lost", "--workers", "1"])
    assert_same("alone", "lost")
