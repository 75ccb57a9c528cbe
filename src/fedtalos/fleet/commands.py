"""Server, node and run of a fleet: Flower's commands with what its folder says, printed so that hands can type them."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from fedtalos.app.config.fleet import FleetNodeConfig, FleetRunConfig, FleetServerConfig
from fedtalos.app.run.display import say
from fedtalos.app.run.interruption import safe_point
from fedtalos.errors import InputError, TrainingError
from fedtalos.files import write_atomic
from fedtalos.fleet.desk import Desk
from fedtalos.fleet.node import Node
from fedtalos.fleet.place import Place
from fedtalos.fleet.processes import Child, by_hand, environment, flower, program, require_flower

STARTUP = 60.0
"""Seconds within which a SuperLink listens."""
TRIES, REFUSED, PAUSE = 5, 60.0, 5.0
"""A node is refused where it ends so often in a row within so many seconds; between two starts it waits."""
ANSWER = 30.0
"""Seconds within which one of Flower's commands ends; without a server they try on for ever."""


def serve(options: FleetServerConfig, console: Console) -> None:
    """Serve until this process is asked to stop."""
    place = Place.read(options.folder)
    with server(place, console, listen=options.listen) as child:
        say(console, f"serving at {place.address}; Ctrl-C ends it")
        status = child.wait()
    raise TrainingError(f"fleet server: the SuperLink ended by itself, with status {status}")


@contextmanager
def server(place: Place, console: Console, *, listen: str = "127.0.0.1", log: Path | None = None) -> Iterator[Child]:
    """Run a SuperLink inside, with the fleet's nodes registered."""
    require_flower()
    words = program("superlink", "--host", listen, "--port", str(place.port))
    if place.tls:
        words += ["--ssl-ca-certfile", str(place.ca), "--ssl-certfile", str(place.certificate)]
        words += ["--ssl-keyfile", str(place.server_key), "--enable-supernode-auth"]
    else:
        words.append("--insecure")
    say(console, by_hand(words))
    home = flower_home(place)
    with Child(words, environment(home), log) as child:
        wait_for_port(child, place.port)
        if place.tls:
            call(program("register", *sorted((place.folder / "keys").glob("client_*.pub"))), home)
        yield child


def flower_home(place: Place) -> Path:
    """Flower's own folder inside the fleet's, with the connection "fleet" to the server on this machine."""
    home = place.folder / ".flwr"
    safety = f"root-certificates = {json.dumps(str(place.ca.resolve()))}" if place.tls else "insecure = true"
    lines = ["[superlink]", 'default = "fleet"', "", "[superlink.fleet]", f'address = "127.0.0.1:{place.port}"', safety]
    write_atomic(home / "config.toml", "\n".join(lines) + "\n")
    return home


def wait_for_port(child: Child, port: int) -> None:
    """Wait until a program listens; TrainingError where it ends instead, or never does."""
    until = time.monotonic() + STARTUP
    while time.monotonic() < until:
        if not child.running:
            break
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
            safe_point()
    raise TrainingError(f"fleet: the server did not start; is port {port} taken? {child.tail()}")


def call(words: Sequence[str], home: Path) -> str:
    """Run one of Flower's commands to its end; returns what it printed.

    Raises TrainingError with its words where it fails.
    """
    try:
        done = subprocess.run(
            words, env=environment(home), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=ANSWER
        )
    except subprocess.TimeoutExpired as error:
        raise TrainingError("fleet: the server does not answer; is it running?") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise TrainingError(f"fleet: `{' '.join(words[-4:])}` failed: {said[-400:]}")
    return done.stdout


def join(options: FleetNodeConfig, console: Console) -> None:
    """Be a node until this process is asked to stop."""
    require_flower()
    place = Place.read(options.folder)
    state = options.state_dir or options.folder / "state" / f"client_{options.client}"
    node = Node(options, state)
    words = node_words(place, options)
    say(console, by_hand(words))
    stopped = threading.Event()
    with Desk() as desk:
        known = environment(state / ".flwr", desk.environment)
        beside = threading.Thread(target=_keep_running, args=(words, known, desk, stopped))
        beside.start()
        try:
            desk.serve(node)
        finally:
            stopped.set()
            beside.join()
    raise TrainingError(
        f"fleet node: the server at {options.server or place.address} refuses this node; "
        f"is keys/client_{options.client} the key that the server was told of?"
    )


def _keep_running(words: list[str], known: dict[str, str], desk: Desk, stopped: threading.Event) -> None:
    """Run Flower's node until ``stopped``, and start it anew where it ends; close the desk where it ends at once.

    It ends when a server that was started again does not know it any more, and has to introduce itself anew.
    """
    refused = 0
    while not stopped.is_set() and refused < TRIES:
        start = time.monotonic()
        with Child(words, known) as child:
            while child.running and not stopped.wait(0.2):
                pass
        refused = refused + 1 if time.monotonic() - start < REFUSED else 0
        stopped.wait(PAUSE)
    desk.close()


def node_words(place: Place, options: FleetNodeConfig) -> list[str]:
    """Words that start Flower's SuperNode for a client; InputError where its files are missing."""
    words = program("supernode", "--superlink", options.server or place.address, "--port", str(free_port()))
    if not place.tls:
        return [*words, "--insecure"]
    for path in (place.ca, place.node_key(options.client)):
        if not path.is_file():
            raise InputError(f"{path}: no such file; copy it from the fleet's folder on the server's machine")
    return [
        *words,
        "--root-certificates",
        str(place.ca),
        "--auth-supernode-private-key",
        str(place.node_key(options.client)),
    ]


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def submit(options: FleetRunConfig, console: Console) -> None:
    """Submit a run, show what it prints, and fail where it failed."""
    require_flower()
    place = Place.read(options.folder)
    output = (options.folder / "runs" if options.output_dir is None else options.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    asked = {
        "run-name": options.run_name or "",
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
    answer = json.loads(call([*words, "--format", "json"], home))
    if not answer.get("success"):
        raise TrainingError(f"fleet run: Flower did not take the run: {answer}")
    follow(str(answer["run-id"]), place, home)


def follow(run: str, place: Place, home: Path) -> None:
    """Show what a run prints until it has ended; TrainingError where it failed, and stop it where this is stopped."""
    ended = False
    try:
        with Child(flower("log", run, "fleet", "--stream"), environment(home)) as log:
            while log.running:
                safe_point()
                check_reachable(place)
                time.sleep(1)
        while (status := status_of(run, home)).partition(":")[0] != "finished":
            safe_point()
            time.sleep(1)
        ended = True
    finally:
        if not ended:
            with suppress(TrainingError):  # the server may be what is gone
                call(flower("stop", run, "fleet"), home)
    if status != "finished:completed":
        raise TrainingError(f"fleet run: the run ended as {status}; what it printed says why")


def check_reachable(place: Place, tries: int = 5) -> None:
    """TrainingError where nobody listens at the server's port any more: Flower would try on for long."""
    for _ in range(tries):
        try:
            with socket.create_connection(("127.0.0.1", place.port), timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise TrainingError("fleet run: the server is gone; start it again, and go on with --resume")


def status_of(run: str, home: Path) -> str:
    """A run's status in Flower's words, such as "running" or "finished:completed"."""
    answer = json.loads(call(flower("list", "fleet", "--run-id", run, "--format", "json"), home))
    runs = answer.get("runs") or [{}]
    return str(runs[0].get("status", "unknown"))
