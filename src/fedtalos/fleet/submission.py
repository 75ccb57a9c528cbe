"""A run of a fleet: submitted to the server by Flower's own command, followed to its end, and judged by it."""

import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtalos.app.config.fleet import FleetRunConfig
from fedtalos.app.run.display import say
from fedtalos.app.run.interruption import safe_point
from fedtalos.errors import InputError, TrainingError
from fedtalos.fleet.commands import call, flower_home
from fedtalos.fleet.place import Place, add_editing
from fedtalos.fleet.processes import Child, environment, flower, require_flower
from fedtalos.fleet.programs import Ended

STOP = 30.0
"""Seconds that Flower is given to stop a run: whoever pressed Ctrl-C waits for it."""


def submit(options: FleetRunConfig, console: Console) -> None:
    """Submit a run, show what it prints, and fail where it failed."""
    require_flower()
    place = Place.read(options.folder)
    if options.min_nodes > place.clients:
        raise InputError(f"min_nodes {options.min_nodes}: the fleet has {place.clients} nodes; lower it")
    check_reachable(place, "the server does not listen; start it with `fedtalos fleet server`")
    output = (options.folder / "runs" if options.output_dir is None else options.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    if options.editing is not None:
        add_editing(place, options.editing)
    asked = {
        "run-name": options.run_name or "",
        "editing": options.editing is not None,
        "resume": options.resume,
        "output-dir": str(output),
        "deadline": options.deadline,
        "patience": options.patience,
        "min-nodes": options.min_nodes,
        "wire": options.wire,
    }
    said = " ".join(f"{name}={json.dumps(value)}" for name, value in asked.items())
    words = flower("run", place.app, "fleet", "--run-config", said)
    say(console, " ".join(["flwr", *words[1:5], json.dumps(said)]))
    home = flower_home(place)
    follow(str(answer_of(words, home)["run-id"]), place, home)


def follow(run: str, place: Place, home: Path) -> None:
    """Show what a run prints until it has ended; TrainingError where it failed, and stop it where this is stopped."""
    ended, ended_as, gone = False, ("", ""), "the server is gone; start it again, and go on with --resume"
    try:
        with Child(flower("log", run, "fleet", "--stream"), environment(home)) as log:
            while log.running:
                safe_point()
                check_reachable(place, gone)
                time.sleep(1)
        while not ended_as[0].startswith("finished"):
            safe_point()
            check_reachable(place, gone)
            ended_as = status_of(run, home)
        ended = True
    finally:
        if not ended:
            with suppress(TrainingError):  # the server may be what is gone
                call(flower("stop", run, "fleet"), home, within=STOP)
    status, details = ended_as
    if status != "finished:completed":
        raise Ended.read(details) or TrainingError(f"fleet run: the run ended as {status}; what it printed says why")


def check_reachable(place: Place, else_say: str) -> None:
    """TrainingError where nobody listens at the server's port: Flower would try on for long."""
    for _ in range(5):
        try:
            with socket.create_connection(("127.0.0.1", place.port), timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise TrainingError(f"fleet run: {else_say}")


def answer_of(words: Sequence[str], home: Path) -> dict[str, Any]:
    """Run one of Flower's commands that answers in JSON.

    Raises TrainingError with its words where it fails, which it tells in its answer alone.
    """
    answer: dict[str, Any] = json.loads(call([*words, "--format", "json"], home))
    if not answer.get("success"):
        raise TrainingError(f"fleet: Flower says {' '.join(str(answer.get('error-message', answer)).split())}")
    return answer


def status_of(run: str, home: Path) -> tuple[str, str]:
    """A run's status in Flower's words, such as "running" or "finished:completed", and what it says of a failure."""
    runs = answer_of(flower("list", "fleet", "--run-id", run), home).get("runs") or [{}]
    return str(runs[0].get("status", "unknown")), str(runs[0].get("status-details", ""))
