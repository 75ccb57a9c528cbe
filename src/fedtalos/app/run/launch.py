"""The processes of `federated --workers N`: started by us on one machine, or by torchrun on several."""

import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, Std, start_processes

from fedtalos.app.config.files import NOT_IN_FILES, flatten
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.run.paths import WORKERS, RunPaths
from fedtalos.app.run.recorder import write_yaml
from fedtalos.devices import choose_device
from fedtalos.errors import InputError
from fedtalos.training.federated.processes import WorkerLostError

MEETING_POINT = "FEDTALOS_MEETING_POINT"  # a file for the processes that we start; torchrun's meet by variables of its
LEADER = "FEDTALOS_LEADER"  # process number of the one that started us
PATIENCE = timedelta(days=7)  # a process that died is noticed by its connections, not by the time that it takes
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

ENDING = {getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")}  # not all on Windows


def rank() -> int:
    """This process's number among those that share a run; 0 leads, and is all there is without workers."""
    return int(os.environ.get("RANK", 0))


def number_of_processes(config: FederatedConfig) -> int:
    """Number of processes that share the run. InputError where torchrun started another number than asked for."""
    started, asked = int(os.environ.get("WORLD_SIZE", 0)), config.federation.workers
    if started and asked not in (1, started):
        raise InputError(f"--workers {asked}: torchrun started {started} processes; leave out --workers")
    return started or asked


def check_alone(command: str) -> None:
    """InputError where torchrun started several processes of a command that is for one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{command}: runs in one process; torchrun is for the rounds of federated alone")


def share_machine(config: FederatedConfig, size: int) -> None:
    """Give this process its part of the cores, and a GPU of its own. InputError where there are too few of these.

    To be called before anything is put on the GPU. Cores are counted, for torchrun sets one thread, whatever there is.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if here == 1:
        return
    if config.run.threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // here))
    device = choose_device(config.run.device)
    if device.type == "mps":
        raise InputError("--workers: an mps GPU is driven by one process; leave --workers out")
    if device.type == "cuda":
        if here > torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise InputError(f"--workers {here}: each takes a GPU of its own, and there are {there}; ask for that many")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


@dataclass(frozen=True)
class Others:
    """The processes beside this one, if any; ``meeting`` is a file where we started them, ``started`` what runs."""

    size: int
    meeting: Path | None = None
    started: PContext | None = None

    def meet(self, device: torch.device) -> None:
        """Wait until all are there. WorkerLostError where one died."""
        if self.meeting is not None:
            _here(self.meeting, rank()).touch()
        while self.started is not None and self.meeting is not None:
            if all(_here(self.meeting, number).exists() for number in range(self.size)):
                break
            if self.started.wait(timeout=0) is not None:
                raise WorkerLostError("it never began")
            time.sleep(0.02)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=None if self.meeting is None else dist.FileStore(str(self.meeting), self.size),  # type: ignore[attr-defined]
                rank=rank(),
                world_size=self.size,
                timeout=PATIENCE,
            )
        except RuntimeError as error:
            raise WorkerLostError(f"the processes did not meet ({error})") from error

    def epitaph(self) -> list[str]:
        """Say what became of those that are gone."""
        said: list[str] = []
        # A connection breaks before its process is gone, so it may take a moment.
        result = None if self.started is None else self.started.wait(timeout=2, period=0.05)
        if self.started is None or result is None:
            return said
        for number, failure in sorted(result.failures.items()):
            code = failure.exitcode
            if code == -signal.SIGTERM and len(result.failures) > 1:
                continue  # torch ended it when another was lost
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            lines = Path(self.started.stderrs[number]).read_text(errors="replace").strip().splitlines()
            said.append(f"worker {number + 1} {how}" + (f" ({lines[-1]})" if lines else ""))
        return said


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let Gloo and NCCL listen where no other machine can connect, here and in processes that are started inside.

    Left alone they listen where the machine's name leads, or on the first network interface.
    """
    names = [name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*|loopback_\d+", name)]
    before = {variable: os.environ.get(variable) for variable in INTERFACES}
    os.environ.update(dict.fromkeys(INTERFACES, names[0]) if names else {})
    try:
        yield
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            os.environ.update({} if value is None else {variable: value})


@contextmanager
def others(config: FederatedConfig, paths: RunPaths | None = None) -> Iterator[Others]:
    """Start the other processes where they are ours to start (``paths``: of the run); after the block none is left.

    A WorkerLostError that leaves the block says what became of the process, and how the run goes on.
    """
    size = number_of_processes(config)
    share_machine(config, size)
    if "RANK" in os.environ or size == 1:
        point = os.environ.get(MEETING_POINT)
        if point is None:
            yield Others(size)
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing to save here, and waiting in C++ runs no handler
        watch = threading.Thread(target=_end_with_the_leader, args=(int(os.environ[LEADER]), Path(point).parent))
        watch.daemon = True
        watch.start()
        yield Others(size, Path(point))
        watch.join()  # the leader no longer answers: it is gone, or ends this process
        return
    assert paths is not None
    with on_loopback(), TemporaryDirectory(prefix=WORKERS, dir=paths.results.absolute()) as folder:
        beside = Others(size, Path(folder) / "meeting", _start(config, Path(folder), size))
        try:
            yield beside
        except WorkerLostError as error:
            said = ": ".join([*beside.epitaph(), str(error)])
            again = f"--resume --run_name {quote(paths.name)} goes on from what is saved"
            raise WorkerLostError(f"{said}; {again}") from error
        finally:
            if beside.started is not None:
                beside.started.close(getattr(signal, "SIGKILL", None))
            if dist.is_initialized():
                dist.destroy_process_group()


def _start(config: FederatedConfig, folder: Path, size: int) -> PContext:
    """Start processes 1 to ``size`` - 1 with torch's own process manager; what they say goes to files."""
    options = {key: value for key, value in flatten(config).items() if key not in NOT_IN_FILES}
    write_yaml(folder / "config.yaml", {**options, "made_by": {"leader": os.getpid()}})  # checked here already
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), LEADER: str(os.getpid())}
    shared[MEETING_POINT] = str(folder / "meeting")
    # A record's own folders are not taken from it (from_file), and weights may be the name of a run in them.
    folders = [f"--{name}={options[name]}" for name in ("output_dir", "cache_dir") if options[name] is not None]
    words = ("-m", "fedtalos", "federated", "--config", str(folder / "config.yaml"), *folders)
    numbers = range(size - 1)  # torch counts from 0; rank 0 is this process
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what became of them is ours to say
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals() & ENDING}
    try:
        return start_processes(
            "fedtalos",
            sys.executable,
            args=dict.fromkeys(numbers, words),
            envs={n: {**shared, "RANK": str(n + 1), "LOCAL_RANK": str(n + 1)} for n in numbers},
            logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL),
        )
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # torch puts its own in their place
                signal.signal(number, handler)


def _end_with_the_leader(leader: int, folder: Path) -> None:
    """End this process soon after the one that started it, however that ended, and remove its folder."""
    while os.getppid() == leader:
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _here(meeting: Path, number: int) -> Path:
    return meeting.with_name(f"here-{number}")
