"""Apple's pfl-research: FederatedAveraging on a SimulatedBackend, in one process or several.

python benchmarks/peers/pfl_simulation.py [--processes 2] [settings]
"""

import os
import sys
import time
from collections.abc import Iterator
from itertools import count
from types import MethodType
from typing import Annotated

import torch
import tyro
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from task import (
    Meter,
    Settings,
    client_images,
    cross_entropy,
    freeze,
    make_model,
    make_optimizer,
    moving,
    sampled_clients,
)

STARTED = "PEER_STARTED"


def main(settings: Annotated[Settings, tyro.conf.arg(name="")], *, processes: int = 1, compile: bool = False) -> None:
    """Print one line of JSON.

    Args:
        processes: that share a round's clients; a divisor of their number, else pfl's processes draw different ones.
        compile: the model, by torch.compile.
    """
    if processes > 1 and distributed.world_size == 1:
        launch(processes)
    started, launcher = (float(os.environ[STARTED]), os.getppid()) if processes > 1 else (None, None)
    meter = Meter(started, launcher, weigh=distributed.global_rank == 0)
    torch.set_num_threads(max(1, settings.threads // processes))
    model = pfl_model(settings)
    if compile:
        model.pytorch_model.compile()
    dataset = FederatedDataset(lambda client: user_dataset(settings, client), cohorts(settings).__next__)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=settings.rounds,
            evaluation_frequency=settings.rounds + 1,
            train_cohort_size=settings.sampled,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(dataset, val_data=dataset, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=settings.local_steps,
            local_learning_rate=settings.learning_rate,
            local_batch_size=settings.batch_size,
        ),
        callbacks=[Clock(meter)],
        send_metrics_to_platform=False,
    )
    if distributed.global_rank == 0:
        meter.report(settings, model.pytorch_model, "pfl")


def launch(processes: int) -> None:
    """Become torchrun, which runs this script ``processes`` times."""
    os.environ[STARTED] = str(time.perf_counter())  # the system's monotonic clock, the same in every process
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    os.execv(sys.executable, [*torchrun, *sys.argv])


def pfl_model(settings: Settings) -> PyTorchModel:
    model = make_model(settings)
    freeze(model, settings)
    model.loss = MethodType(cross_entropy, model)
    # pfl evaluates the clients of its first round whatever evaluation_frequency says: let that cost nothing.
    model.metrics = lambda *_: {"nothing": Weighted(0, 1)}
    return PyTorchModel(
        model=model,
        local_optimizer_create=lambda parameters, lr: make_optimizer(list(parameters), settings),  # noqa: ARG005
        central_optimizer=torch.optim.SGD(moving(model).values(), lr=1.0),
        amp_dtype=torch.bfloat16 if settings.precision == "bf16" else None,
    )


def user_dataset(settings: Settings, client: int) -> PyTorchTensorDataset:
    return PyTorchTensorDataset(client_images(settings, client), user_id=str(client))


def cohorts(settings: Settings) -> Iterator[int]:
    """The clients of round 1, of round 2, ..., one by one."""
    for number in count(1):
        yield from sampled_clients(settings, number)


class Clock(TrainingProcessCallback):
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.meter.mark()
        return Metrics()

    def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
        self.meter.mark()
        return False, Metrics()


if __name__ == "__main__":
    tyro.cli(main)
