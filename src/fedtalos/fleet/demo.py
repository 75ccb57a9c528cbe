"""A fleet on one machine: a server and three nodes on loopback, rounds on digits with a mask, and an end to it all."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.fleet import FleetDemoConfig, FleetInitConfig, FleetRunConfig
from fedtalos.app.run.display import say
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import write_yaml
from fedtalos.errors import TrainingError
from fedtalos.fleet.commands import free_port, server
from fedtalos.fleet.place import Place, make_place
from fedtalos.fleet.processes import Child
from fedtalos.fleet.submission import submit
from fedtalos.models.load import build_model
from fedtalos.models.vision_transformer import Architecture
from fedtalos.training.editing.controls import random_mask
from fedtalos.training.editing.mask_file import save_mask

NODES = 3
DIGITS = {
    "dataset": "digits",
    "model_size": "micro",
    "image_size": 8,
    "patch_size": 4,
    "weights": "none",
    "head": "random",
    "num_clients": NODES,
    "client_fraction": 1.0,
    "partition": "label_skew",
    "classes_per_client": 5,
    "local_steps": 16,
    "batch_size": 32,
    "learning_rate": 3e-3,
    "eval_every": 5,
    "device": "cpu",
    "threads": 1,
}


def run_demo(options: FleetDemoConfig, console: Console) -> None:
    """Set a fleet up in a folder for a while, run it, print its table, and stop and remove all but the results."""
    name = options.run_name or f"fleet-{datetime.now():%Y%m%d-%H%M%S}"
    mask = RunPaths(options.output_dir, name).mask.resolve()
    make_random_mask(mask, options.seed)
    values = {**DIGITS, "num_rounds": options.num_rounds, "seed": options.seed, "mask": str(mask)}
    with tempfile.TemporaryDirectory(prefix="fedtalos-fleet-") as folder, fleet(Path(folder), values, console) as place:
        submit(
            FleetRunConfig(folder=place.folder, run_name=name, output_dir=options.output_dir, wire=options.wire),
            console,
        )
    console.print(table_of(RunPaths(options.output_dir, name)))


def make_random_mask(path: Path, seed: int) -> None:
    """Write a mask that lets a tenth of the demo's model move, drawn at random."""
    model = build_model(Architecture("micro", 8, 4, num_classes=10), seed)
    save_mask(path, random_mask(model, density=0.1, seed=seed), model, criterion="random")


@contextmanager
def fleet(folder: Path, values: dict[str, Any], console: Console, *, tls: bool = True) -> Iterator[Place]:
    """Run a server and a node for each client on this machine inside; TrainingError where one does not start."""
    place, logs = set_up(folder, values, tls=tls), folder / "logs"
    with server(place, console, log=logs / "server.log"), ExitStack() as nodes:
        started = []
        for client in range(place.clients):
            words = node_command(place, client, ["--dataset", str(values["dataset"]), "--holds", "part"])
            started.append(nodes.enter_context(Child(words, child_environment(), logs / f"node_{client}.log")))
        say(console, f"a server and {place.clients} nodes are on this machine; what they print is in {logs}")
        yield place
        for client, node in enumerate(started):
            if not node.running:
                raise TrainingError(f"fleet demo: node {client} ended: {node.tail()}")


def set_up(folder: Path, values: dict[str, Any], *, tls: bool = True) -> Place:
    """Make a fleet's folder for this machine, at a port that is free."""
    write_yaml(folder / "federated.yaml", values)
    return make_place(
        FleetInitConfig(folder=folder / "fleet", config=folder / "federated.yaml", port=free_port(), tls=tls)
    )


def node_command(place: Place, client: int, more: Sequence[str]) -> list[str]:
    """Words that start a node of this machine."""
    words = [sys.executable, "-m", "fedtalos", "fleet", "node", str(place.folder), "--client", str(client)]
    return [*words, "--device", "cpu", "--threads", "1", *more]


def child_environment() -> dict[str, str]:
    """Environment of a node that runs beside others on this machine: one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def table_of(paths: RunPaths) -> Table:
    """Make a table of what a fleet's run reached."""
    summary = read_yaml(paths.results / "summary.yaml")
    table = Table(
        title=f"digits: {NODES} nodes with 5 classes each, a tenth of the weights moves", title_justify="left"
    )
    for column in ("rounds", "test accuracy (%)", "down (MB)", "up (MB)", "seconds"):
        table.add_column(column, justify="right")
    sent = summary["megabytes_sent"]
    accuracy = f"{100 * summary['test_accuracy']['last']:.1f}"
    cells = [summary["rounds"], accuracy, f"{sent['down']:.2f}", f"{sent['up']:.2f}", f"{summary['seconds']:.0f}"]
    table.add_row(*map(str, cells))
    return table
