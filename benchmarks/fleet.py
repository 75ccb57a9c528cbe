"""What a fleet costs: wires, messages and memory by number of nodes, and on loopback seconds and the network's bytes.

python benchmarks/fleet.py wires              # accuracy and bytes by wire, digits, in one process
python benchmarks/fleet.py scale              # server memory and seconds at 10, 100 and 1 000 stand-ins for nodes
python benchmarks/fleet.py loopback           # our count of bytes against the network's; needs Flower (docs/fleet.md)
python benchmarks/fleet.py nodes              # seconds and memory of 3, 6 and 12 real nodes; needs Flower
"""

import csv
import logging
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import chdir, suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console

from fedtalos._version import __version__
from fedtalos.app.config.files import override, read_yaml
from fedtalos.app.config.fleet import FleetNodeConfig, FleetRunConfig, Wire
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.data.images import LabelledImages
from fedtalos.fleet.commands import server
from fedtalos.fleet.demo import DIGITS, NODES, child_environment, fleet, make_random_mask, node_command, set_up
from fedtalos.fleet.engine import on_nodes
from fedtalos.fleet.gathering import Terms
from fedtalos.fleet.in_process import InProcess
from fedtalos.fleet.letter import Letter
from fedtalos.fleet.members import Members
from fedtalos.fleet.node import Node
from fedtalos.fleet.processes import Child
from fedtalos.fleet.rounds import run_rounds
from fedtalos.fleet.submission import submit
from fedtalos.models.load import build_model
from fedtalos.models.vision_transformer import Architecture
from fedtalos.training.editing.controls import random_mask
from fedtalos.training.editing.mask_file import save_mask
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import fedavg
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

QUIET = Console(quiet=True)
WIRES: tuple[Wire, ...] = ("float32", "float16", "bfloat16", "int8")


def wires(rounds: int = 10, seeds: int = 3) -> None:
    """Accuracy and bytes of the demo's run by wire, over seeds."""
    print("| wire | moves | test accuracy (%), mean of seeds, lowest, highest | up (MB) |\n|---|---|---|---|")
    for masked in (False, True):
        for wire in WIRES:
            figures = [one_run(wire, masked, seed, rounds) for seed in range(seeds)]
            accuracies = [100 * accuracy for accuracy, _ in figures]
            low, high, mean = min(accuracies), max(accuracies), sum(accuracies) / seeds
            moves = "a tenth" if masked else "all"
            print(f"| {wire} | {moves} | {mean:.1f} ({low:.1f} to {high:.1f}) | {figures[0][1]:.2f} |", flush=True)


def one_run(wire: Wire, masked: bool, seed: int, rounds: int) -> tuple[float, float]:
    """Test accuracy, 0 to 1, and megabytes up."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        values = {**DIGITS, "num_rounds": rounds, "eval_every": rounds, "seed": seed, "run_name": "run"}
        if masked:
            make_random_mask(Path("m.safetensors"), seed)
            values["mask"] = "m.safetensors"
        else:
            values["learning_rate"] = 1e-3
        nodes = [
            Node(
                FleetNodeConfig(folder=Path(), client=client, dataset="digits", holds="part", device="cpu", threads=1),
                Path("state", str(client)),
            )
            for client in range(NODES)
        ]
        run_rounds(override(FederatedConfig(), values, "benchmark"), InProcess(nodes), Terms(wire=wire), QUIET)
        summary = read_yaml(Path("results/run/summary.yaml"))
    return summary["test_accuracy"]["last"], summary["megabytes_sent"]["up"]


class Echo:
    """A stand-in for a node: its update is theta, a little changed, and takes no time to make."""

    def __init__(self, client: int) -> None:
        self.client = client

    def answer(self, letter: Letter) -> Letter:
        match letter.kind:
            case "hello":
                return Letter("hello", {"client": self.client, "version": __version__})
            case "begin":
                return Letter("begun", {"run": 64 * "0", "images": 100})
        values = letter.arrays["theta"] + np.float32(1e-6)
        return Letter("update", {"loss_sum": 1.0, "correct": 1, "examples": 2}, {"values": values})


def scale(counts: Sequence[int] = (10, 100, 1000)) -> None:
    """Messages, bytes, memory and seconds of a round, ViT-Ti, and what a wide area network would add."""
    print("| nodes | moves | messages | MB down | MB up | peak memory (MB) | s | s at 100 Mbit/s | s at 10 Mbit/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    model = build_model(Architecture("tiny", 32, 4, num_classes=100))
    for density in (0.1, None):
        moving = MaskedParameters(model, None if density is None else random_mask(model, density))
        for count in counts:
            members = Members(InProcess(map(Echo, range(count))), count, deadline=60)
            members.prepare(Letter("begin", {"bench": count}), b"")
            members.gather(patience=600)
            members.bytes_since()
            images = LabelledImages(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
            clients = Clients(images, np.zeros(0, np.int64), np.arange(count + 1) * 100)
            start = time.perf_counter()
            for _ in fedavg(
                moving, clients, local=LocalTraining(), rounds=1, fraction=1.0,
                engine=lambda *given, members=members: on_nodes(*given, members=members),
            ):  # fmt: skip
                pass
            seconds = time.perf_counter() - start
            down, up = (amount / 1e6 for amount in members.bytes_since())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            line = [8 * max(down, up) / rate for rate in (100, 10)]  # the server's line, each way at once
            cells = [count, "all" if density is None else "a tenth", 2 * count, *map(round, (down, up, peak))]
            print(f"| {' | '.join(map(str, cells))} | {seconds:.1f} | {line[0]:.0f} | {line[1]:.0f} |", flush=True)


def loopback(rounds: int = 3) -> None:
    """Bytes that we count against those of a forwarder between node and server, by what moves."""
    print("| model | moves | messages | way | counted (MB) | on the network (MB) | more | s a round |")
    print("|---|---|---|---|---|---|---|---|")
    for size in ("micro", "tiny"):
        for masked in (True, False):
            sent, seen, seconds = one_node(size, masked, rounds)
            moves = "a tenth" if masked else "all"
            for way in ("down", "up"):
                more = f"{100 * (seen[way] / sent[way] - 1):.1f} %"
                cells = [size, moves, rounds + 3, way, f"{sent[way]:.2f}", f"{seen[way]:.2f}", more, f"{seconds:.0f}"]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def one_node(size: str, masked: bool, rounds: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Megabytes counted and seen, by way, and seconds of a round, of a run with one node on loopback with TLS.

    Its messages are hello, begin, begin with the still part, and one a round.
    """
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        values = {**DIGITS, "model_size": size, "num_rounds": rounds, "num_clients": 1, "local_steps": 1}
        values |= {"batch_size": 8, "eval_every": rounds, "partition": "iid"}
        if masked:
            architecture = Architecture(size, 8, 4, num_classes=10)
            model = build_model(architecture, seed=0)
            save_mask(Path("m.safetensors"), random_mask(model, density=0.1), model, criterion="random")
            values["mask"] = str(Path("m.safetensors").resolve())
        place = set_up(Path("place"), values)
        with server(place, QUIET, log=Path("server.log")), Forwarder(place.port) as between:
            more = ["--dataset", "digits", "--holds", "part", "--server", f"127.0.0.1:{between.port}"]
            with Child(node_command(place, 0, more), child_environment(), Path("node.log")):
                while not between.up:
                    time.sleep(1)
                time.sleep(20)  # until it has introduced itself; then it only asks for work
                before, start = (between.down, between.up), time.monotonic()
                time.sleep(40)
                idle = (between.down + between.up - sum(before)) / (time.monotonic() - start)
                print(f"a node that waits: {60 * idle / 1e3:.1f} kB a minute, both ways", flush=True)
                before = between.down, between.up
                options = FleetRunConfig(folder=place.folder, run_name="run", output_dir=Path(), patience=600)
                submit(options, QUIET)
                seen = {"down": (between.down - before[0]) / 1e6, "up": (between.up - before[1]) / 1e6}
        return read_yaml(Path("results/run/summary.yaml"))["megabytes_sent"], seen, seconds_a_round()


def seconds_a_round() -> float:
    """Median of the seconds of a run's rounds after its first."""
    with Path("results/run/metrics.csv").open() as lines:
        ends = [float(row["seconds"]) for row in csv.DictReader(lines) if row["split"] == "train"]
    return float(np.median(np.diff(ends)))


def nodes(rounds: int = 4) -> None:
    """Seconds of a round, and memory of all processes together, by number of nodes on this machine."""
    print("| nodes | s a round | memory of all processes at most (MB, PSS) |\n|---|---|---|")
    for count in (3, 6, 12):
        with tempfile.TemporaryDirectory() as folder, chdir(folder), Memory() as memory:
            values = {**DIGITS, "num_clients": count, "num_rounds": rounds, "eval_every": rounds}
            with fleet(Path("place"), values, QUIET) as place:
                options = FleetRunConfig(folder=place.folder, run_name="run", output_dir=Path(), patience=900)
                submit(options, QUIET)
            print(f"| {count} | {seconds_a_round():.0f} | {memory.peak / 1e6:,.0f} |", flush=True)


class Memory:
    """Watches the memory of this process's children, shared pages counted once (PSS); ``peak`` in bytes."""

    def __init__(self) -> None:
        self.peak, self._over = 0, threading.Event()
        self._watching = threading.Thread(target=self._watch)

    def __enter__(self) -> "Memory":
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._over.wait(2):
            total = 0
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    total += child.memory_full_info().pss
            self.peak = max(self.peak, total)


class Forwarder:
    """Passes connections of nodes on to a server, and counts the bytes."""

    def __init__(self, to: int) -> None:
        self._to, self.up, self.down = to, 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> "Forwarder":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            threading.Thread(target=self._pass, args=(near, far, "up"), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, "down"), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            logging.debug("a connection ended")


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure: dict[str, Callable[[], None]] = {"wires": wires, "scale": scale, "loopback": loopback, "nodes": nodes}
    measure[sys.argv[1]]()
