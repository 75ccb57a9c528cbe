"""The processes of `federated --workers N`: started by us on one machine, or by torchrun on several."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from fedtalos.app.config.files import NOT_IN_FILES, flatten
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.run.recorder import write_yaml
from fedtalos.devices import choose_device
from fedtalos.errors import InputError
from fedtalos.training.federated.processes import WorkerLostError

START = "from fedtalos.cli import main; main()"
MEETING_POINT = "FEDTALOS_MEETING_POINT"  # a file for the processes that we start; torchrun's meet by variables of its
PATIENCE = timedelta(days=7)  # a process that died is noticed by its connections, not by the time that it takes


def rank() -> int:
    """This process's number among those that share a run; 0 leads, and is all there is without workers."""
    return int(os.environ.get("RANK", 0))


def number_of_processes(config: FederatedConfig) -> int:
    """How many share the run. InputError where torchrun started another number than asked for."""
    started, asked = int(os.environ.get("WORLD_SIZE", 0)), config.federation.workers
    if started and asked not in (1, started):
        raise InputError(f"--workers {asked}: torchrun started {started} processes; leave out --workers")
    return started or asked


def check_alone(command: str) -> None:
    """InputError where torchrun started several processes of a command that is for one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{command}: runs in one process; torchrun is for federated alone")


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
class Child:
    """A process that we started, with its rank and the file that takes what it has to say."""

    rank: int
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def epitaph(self) -> str:
        """What became of it, in words."""
        code = self.process.poll()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"worker {self.rank} {how}" + (f" ({lines[-1]})" if lines else "")


@dataclass(frozen=True)
class Others:
    """The processes beside this one; ``meeting`` is a file's path where we started them, else None."""

    size: int
    meeting: Path | None
    children: list[Child]

    def meet(self, device: torch.device) -> None:
        """Wait until all are there. WorkerLostError where one died."""
        if self.meeting is not None and rank():
            _here(self.meeting, rank()).touch()
        there = False
        while not there:
            there = all(_here(child.log.with_name("meeting"), child.rank).exists() for child in self.children)
            if any(child.process.poll() is not None for child in self.children):
                raise WorkerLostError("it never began")
            time.sleep(0.02)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                init_method="env://" if self.meeting is None else f"file://{self.meeting.absolute()}",
                rank=rank(),
                world_size=self.size,
                timeout=PATIENCE,
            )
        except RuntimeError as error:
            raise WorkerLostError(f"the processes did not meet ({error})") from error


@contextmanager
def others(config: FederatedConfig) -> Iterator[Others]:
    """Start the other processes where they are ours to start; after the block none is left.

    A WorkerLostError that leaves the block says what became of the process.
    """
    size = number_of_processes(config)
    share_machine(config, size)
    if "RANK" in os.environ or size == 1:
        point = os.environ.get(MEETING_POINT)
        if point is not None:
            threading.Thread(target=_end_with_the_leader, args=(Path(point).parent,), daemon=True).start()
        yield Others(size, None if point is None else Path(point), [])
        return
    with TemporaryDirectory(prefix="fedtalos-") as folder:
        options = {key: value for key, value in flatten(config).items() if key not in NOT_IN_FILES}
        write_yaml(Path(folder) / "config.yaml", options)
        children = [_start(Path(folder), number, size) for number in range(1, size)]
        try:
            yield Others(size, Path(folder) / "meeting", children)
        except WorkerLostError as error:
            time.sleep(0.2)  # a connection breaks before its process is gone
            gone = [child.epitaph for child in children if child.process.poll() is not None]
            raise WorkerLostError(": ".join([*gone, str(error)])) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for child in children:
                with child.process:  # closes its stdin and waits
                    child.process.kill()


def agreed(config: FederatedConfig) -> FederatedConfig:
    """The leader's config, at the leader and everywhere else: what is settled by measuring is settled once."""
    configs: list[Any] = [config]
    dist.broadcast_object_list(configs, 0, device=torch.device("cpu"))
    out: FederatedConfig = configs[0]
    return out


def _start(folder: Path, number: int, size: int) -> Child:
    ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    log = folder / f"stderr-{number}"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", START, "federated", "--config", str(folder / "config.yaml")],
            env={**os.environ, **{k: str(v) for k, v in ranks.items()}, MEETING_POINT: str(folder / "meeting")},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is for the leader, who ends the others
        )
    return Child(number, process, log)


def _end_with_the_leader(folder: Path) -> None:
    os.read(0, 1)  # of a pipe from the leader: it ends when the leader does, however that is
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _here(meeting: Path, number: int) -> Path:
    return meeting.with_name(f"here-{number}")
