"""BlazeFL: its pools of threads or processes that train clients, and FedAvg of its flat vectors.

python benchmarks/peers/blazefl_simulation.py [--parallel 2] [--processes] [settings]
"""

import threading
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
import torch.multiprocessing as mp
import tyro
from blazefl.core import (
    IPCMode,
    ProcessPoolClientTrainer,
    SHMHandle,
    ThreadPoolClientTrainer,
    deserialize_model,
    serialize_model,
)
from task import (
    Meter,
    Settings,
    client_batches,
    client_size,
    freeze,
    loss,
    make_model,
    make_optimizer,
    moving,
    sampled_clients,
)
from torch import Tensor, nn


@dataclass
class Down:
    """Global values, as BlazeFL sends them: all of a model's, flat, on the CPU."""

    values: Tensor


@dataclass
class Up:
    """A client's values and number of images; of a process, a handle of its shared memory."""

    values: Tensor | SHMHandle
    size: int


def main(settings: Annotated[Settings, tyro.conf.arg(name="")], *, parallel: int = 1, processes: bool = False) -> None:
    """Print one line of JSON.

    Args:
        parallel: clients that train at once, each with its share of the threads.
        processes: a pool of processes with shared memory, which BlazeFL makes anew each round, instead of threads.
    """
    meter = Meter()
    torch.set_num_threads(settings.threads)
    model = make_model(settings)
    trainer = Processes(settings, parallel) if processes else Threads(settings, parallel)
    meter.mark()
    for number in range(1, settings.rounds + 1):
        trainer.local_process(Down(serialize_model(model)), sampled_clients(settings, number))
        deserialize_model(model, mean(trainer.cache))
        trainer.cache = []
        meter.mark()
    meter.report(settings, model, "blazefl")


def mean(updates: list[Up]) -> Tensor:
    """Mean by numbers of images, as its FedAvg adds it up."""
    total, whole = sum(update.size for update in updates), torch.zeros_like(updates[0].values)
    for update in updates:
        whole.add_(update.values, alpha=update.size / total)
    return whole


class Threads(ThreadPoolClientTrainer[Up, Down]):
    """Clients in threads of this process."""

    def __init__(self, settings: Settings, parallel: int) -> None:
        self.settings, self.num_parallels = settings, parallel
        self.device, self.device_count = settings.device, 1
        self.cache, self.stop_event, self._own = [], threading.Event(), threading.local()

    def worker(self, cid: int, device: str, payload: Down, stop_event: threading.Event) -> Up:
        if not hasattr(self._own, "model"):
            self._own.model = resident(self.settings, self.num_parallels)
        return trained(self._own.model, self.settings, cid, payload)


class Processes(ProcessPoolClientTrainer[Up, Down, tuple[Settings, int, int]]):
    """Clients in a pool of processes; values come and go through shared memory."""

    def __init__(self, settings: Settings, parallel: int) -> None:
        mp.set_start_method("forkserver")  # what a process forked from this one would inherit are locked threads
        mp.set_forkserver_preload(["task", "blazefl.core"])  # in its favour: imported once, not in every round
        self.settings, self.num_parallels = settings, parallel
        self.device, self.device_count = settings.device, 1
        self.cache, self.ipc_mode, self.stop_event = [], IPCMode.SHARED_MEMORY, mp.Manager().Event()
        self._like = serialize_model(make_model(settings))

    def get_client_config(self, cid: int) -> tuple[Settings, int, int]:
        return self.settings, self.num_parallels, cid

    def prepare_uplink_package_buffer(self) -> Up:
        return Up(self._like.clone(), 0)

    @staticmethod
    def worker(
        config: tuple[Settings, int, int],
        payload: Down,
        device: str,  # noqa: ARG004
        stop_event: threading.Event,  # noqa: ARG004
        *,
        shm_buffer: Up,
    ) -> Up:
        settings, parallel, client = config
        update = trained(resident_in_process(settings, parallel), settings, client, payload)
        shm_buffer.values.copy_(update.values)
        return Up(SHMHandle(), update.size)


def resident(settings: Settings, parallel: int) -> nn.Module:
    """A model that stays in its thread from client to client."""
    torch.set_num_threads(max(1, settings.threads // parallel))
    model = make_model(settings)
    freeze(model, settings)
    return model


resident_in_process = cache(resident)


def trained(model: nn.Module, settings: Settings, client: int, payload: Down) -> Up:
    """Train one client from the global values."""
    deserialize_model(model, payload.values)
    optimizer = make_optimizer(list(moving(model).values()), settings)
    for pixels, labels in client_batches(settings, client):
        optimizer.zero_grad()
        loss(model, pixels, labels, settings).backward()
        optimizer.step()
    return Up(serialize_model(model), client_size(settings, client))


if __name__ == "__main__":
    tyro.cli(main)
