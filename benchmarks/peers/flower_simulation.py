"""Flower's simulation (Ray): a ClientApp that trains, a ServerApp with FedAvg, some actors at once.

python benchmarks/peers/flower_simulation.py [--actors 2] [settings]
"""

import os
from typing import Annotated

os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import torch
import tyro
from flower_client import client_app
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from task import Meter, Settings, freeze, make_model, moving
from torch import nn


def main(settings: Annotated[Settings, tyro.conf.arg(name="")], *, actors: int = 1) -> None:
    """Print one line of JSON.

    Args:
        actors: clients that train at once, each with its share of the threads; Flower draws the clients of a round.
    """
    meter = Meter()
    torch.set_num_threads(settings.threads)
    threads = max(1, settings.threads // actors)
    model = make_model(settings)
    freeze(model, settings)
    run_simulation(
        server_app=server_app(settings, model, meter),
        client_app=client_app(settings, threads),
        num_supernodes=settings.clients,
        backend_config={
            "init_args": {"num_cpus": threads * actors},
            "client_resources": {"num_cpus": threads, "num_gpus": 0.0},
        },
    )
    meter.report(settings, model, "flwr", "ray")


def server_app(settings: Settings, model: nn.Module, meter: Meter) -> ServerApp:
    """Starts with the weights of ``model``, and leaves the last global ones in it."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, _: Context) -> None:
        strategy = FedAvg(
            fraction_train=settings.sampled / settings.clients,
            min_train_nodes=settings.sampled,  # the fraction alone is cut off to a whole number
            min_available_nodes=settings.clients,
            fraction_evaluate=0.0,
            train_metrics_aggr_fn=count_replies,
        )
        result = strategy.start(
            grid,
            initial_arrays=ArrayRecord({name: parameter.detach() for name, parameter in moving(model).items()}),
            num_rounds=settings.rounds,
            evaluate_fn=lambda *_: meter.mark(),  # called before round 1 and after every round: the clock
        )
        replies = [metrics["replies"] for metrics in result.train_metrics_clientapp.values()]
        if replies != [settings.sampled] * settings.rounds:
            raise RuntimeError(f"Flower: expected {settings.sampled} clients in every round, got {replies}")
        model.load_state_dict(result.arrays.to_torch_state_dict(), strict=False)

    return app


def count_replies(replies: list[RecordDict], _: str) -> MetricRecord:
    """Clients that fail are only logged and left out of the mean."""
    return MetricRecord({"replies": len(replies)})


if __name__ == "__main__":
    tyro.cli(main)
