"""Runs that are killed at any moment, and gone on with: the same files to the byte, timing columns aside."""

import errno
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import pytest
import torch
from commands import outcome

from fedtalos.app.run.books import Books
from fedtalos.app.run.recorder import Recorder
from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main
from fedtalos.training import loop

MAIN = Path(__file__).parents[2] / "main.py"
MOUNT = shlex.split("mount -t tmpfs tmpfs disk")
DIGITS = "--dataset digits --model_size micro --image_size 8 --patch_size 4 --device cpu --precision fp32 --threads 1 "
SMALL = DIGITS + "--train_limit 80 --eval_limit 20 --weights none "
RUN = SMALL + "--run_name run --resume_or_start "
COMMANDS = {
    "centralized": "centralized --num_epochs 6 --batch_size 16 --eval_every 2 " + RUN,
    "federated": "federated --num_rounds 6 --num_clients 4 --client_fraction 0.5 --local_steps 2 --batch_size 16 "
    "--eval_every 2 --head ridge " + RUN,
    "editing": "editing --num_iterations 3 --calibration_fraction 0.1 --calibration_images 48 " + RUN,
}

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


def forked(arguments: Sequence[str], prepare: Callable[[], object] = int) -> int:
    """A process that prepares and runs the command; everything is imported already. Its output is the file `said`."""
    if torch.cuda.is_initialized():
        pytest.skip("this process has used CUDA: autograd does not work in a fork of it")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare()
            sys.stdout = sys.stderr = Path("said").open("w", buffering=1)  # noqa: SIM115
            main(arguments)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(condition: Callable[[], bool], child: int) -> None:
    """Wait as long as the child lives."""
    while not condition():
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, Path("said").read_text()
        time.sleep(0.002)


def stops_itself(number: int, owner: object, name: str, calls: int) -> Callable[[], object]:
    """What prepares a process to send itself a signal after so many calls of a function, whatever time they take."""

    def prepare() -> None:
        function, seen = getattr(owner, name), []

        def signalled(*args: object, **kwargs: object) -> object:
            result = function(*args, **kwargs)
            seen.append(1)
            if len(seen) == calls:
                os.kill(os.getpid(), number)
            return result

        setattr(owner, name, signalled)

    return prepare


@cache
def whole(command: str) -> tuple[dict[str, object], float]:
    """What the command leaves where nothing stops it, and the seconds that it took."""
    here = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        start = time.monotonic()
        assert exit_code(forked(shlex.split(command))) == 0, Path("said").read_text()
        found = outcome(), time.monotonic() - start
        os.chdir(here)
    return found


def kill_at_random_moments(command: str, kills: int, seed: object = 0) -> None:
    """SIGKILL it ``kills`` times, at moments spread over what it takes, and let the last one end.

    When it is killed is left to the machine, and must not matter.
    """
    moments, seconds = random.Random(str(seed)), whole(command)[1]
    for _ in range(kills):
        child = forked(shlex.split(command))
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert exit_code(forked(shlex.split(command))) == 0, Path("said").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(command):
    kill_at_random_moments(COMMANDS[command], kills=5)
    assert outcome() == whole(COMMANDS[command])[0]
    assert not list(Path().glob("**/.*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_many_more_moments(command, seed):
    kill_at_random_moments(COMMANDS[command], kills=8, seed=seed)
    assert outcome() == whole(COMMANDS[command])[0]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["demo --run_name run --resume_or_start", "sweep digits --threads 1"])
def test_commands_of_many_runs_go_on_too(command):
    kill_at_random_moments(command, kills=8)
    assert outcome() == whole(command)[0]


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [("centralized", signal.SIGINT, 130), ("federated", signal.SIGTERM, 143), ("editing", signal.SIGTERM, 143)],
)
def test_asked_to_stop_a_run_saves_says_how_to_go_on_and_does(command, number, code):
    owner = Books if command == "editing" else Recorder
    child = forked(shlex.split(COMMANDS[command]), stops_itself(number, owner, "record", 1 + (owner is Recorder)))
    assert exit_code(child) == code, Path("said").read_text()
    said = Path("said").read_text()
    assert f"fedtalos {command} --resume --run_name run goes on" in said
    assert "Traceback" not in said
    assert exit_code(forked([command, "--resume", "--run_name", "run"])) == 0, Path("said").read_text()
    assert outcome() == whole(COMMANDS[command])[0]


def test_an_epoch_goes_on_from_the_step_at_which_it_was_stopped():
    one_epoch = "centralized --num_epochs 1 --batch_size 1 --run_name run " + SMALL
    child = forked(shlex.split(one_epoch), stops_itself(signal.SIGINT, loop, "fetch", 30))
    assert exit_code(child) == 130, Path("said").read_text()
    so_far = json.loads(Path("checkpoints/run/last.json").read_text())["progress"]["epoch_so_far"]
    assert 0 < so_far["examples"] < 80
    assert exit_code(forked(["centralized", "--resume"])) == 0
    assert outcome() == whole(one_epoch)[0]


def test_two_processes_do_not_work_on_one_run(capsys):
    arguments = [*shlex.split(COMMANDS["federated"]), "--num_rounds", "1000000"]
    child = forked(arguments)
    wait_for(Path("results/run/config.yaml").exists, child)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "another process is working on it" in capsys.readouterr().err
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    Path("said").write_text("")
    child = forked(arguments)  # a dead process holds nothing
    wait_for(lambda: "round 1/" in Path("said").read_text(), child)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130


@pytest.mark.skipif(os.name != "posix", reason="flock is of POSIX")
@pytest.mark.parametrize("why", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_said_and_nothing_stays(why, monkeypatch, capsys):
    import fcntl

    def refuse(*_):
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SystemExit, match="2"):
        main(shlex.split(COMMANDS["federated"]))
    said = capsys.readouterr().err
    assert said.startswith(
        f"fedtalos: results/run/.lock: cannot be locked ({os.strerror(why)}); choose an --output_dir"
    )
    assert said.count("\n") == 1
    assert not any(Path().iterdir())


def test_bad_input_leaves_no_folder_behind():
    with pytest.raises(SystemExit, match="2"):
        main([*shlex.split(COMMANDS["federated"]), "--num_clients", "5000"])
    assert not any(Path().iterdir())


def test_resume_or_start_begins_what_never_began(capsys):
    main([*shlex.split(COMMANDS["federated"]), "--num_rounds", "1"])
    assert "run run begins" in capsys.readouterr().out
    main([*shlex.split(COMMANDS["federated"]), "--num_rounds", "1"])
    assert "run is finished already" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="file size limits are of POSIX")
def test_a_full_disk_is_said_and_leaves_what_can_be_gone_on_with():
    import resource

    command = COMMANDS["federated"]
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # a checkpoint is larger, the tables are not
        os._exit(exit_code(forked(shlex.split(command))))
    assert exit_code(child) == 2
    said = Path("said").read_text()
    assert "too large" in said
    assert "Traceback" not in said
    assert not list(Path().glob("**/.*.part"))
    assert exit_code(forked(shlex.split(command))) == 0
    assert outcome() == whole(command)[0]


def test_on_a_disk_that_fills_up_the_last_checkpoint_stays_and_the_run_goes_on_once_there_is_room(monkeypatch):
    fill_and_go_on = """
        mount -t tmpfs -o size=7m tmpfs disk && cd disk  # room for two checkpoints, not for the next beside them
        code=0; "$@" > ../said 2>&1 || code=$?; echo $code > ../code
        find . -name '.*.part' > ../left
        cp -r checkpoints ../then
        mount -t tmpfs -o remount,size=64m tmpfs .
        "$@" && cp -r . ../after
    """
    Path("disk").mkdir()
    own_mounts = ["unshare", "-rm"]
    if which("unshare") is None or subprocess.run([*own_mounts, *MOUNT], check=False).returncode:
        pytest.skip("nobody may mount a tmpfs here")
    run = [sys.executable, str(MAIN), *shlex.split(COMMANDS["federated"])]
    subprocess.run([*own_mounts, "sh", "-ec", fill_and_go_on, "sh", *run], check=True)
    said = Path("said").read_text()
    assert Path("code").read_text() == "2\n", said
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert Path("left").read_text() == ""
    assert load_checkpoint(Path("then/run/last.json")).tensors
    monkeypatch.chdir("after")
    found, expected = outcome(), whole(COMMANDS["federated"])[0]
    assert {name: found[name] for name in expected} == expected  # beside it there are figures
