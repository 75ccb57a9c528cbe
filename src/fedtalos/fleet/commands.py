"""Server and node of a fleet: Flower's commands with what its folder says, printed so that hands can type them."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from fedtalos.app.config.files import override
from fedtalos.app.config.fleet import FleetNodeConfig, FleetServerConfig
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.load import check_files
from fedtalos.app.run.display import say
from fedtalos.app.run.interruption import safe_point
from fedtalos.errors import InputError, TrainingError
from fedtalos.files import write_atomic
from fedtalos.fleet.desk import Desk
from fedtalos.fleet.node import Node
from fedtalos.fleet.place import Place
from fedtalos.fleet.processes import Child, by_hand, environment, program, require_flower
from fedtalos.fleet.task import own_options

STARTUP = 120.0
"""Seconds within which a SuperLink listens."""
PAUSE, BRIEF, REFUSED = 5.0, 60.0, 90.0
"""Seconds between two starts of a node, within which one was brief, and of brief ones in a row until it is refused.

A server takes a node that was killed for there for two heartbeats, 60 s, and refuses its successor meanwhile.
"""
ANSWER = 120.0
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
    check_free(listen, place.port)
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


def check_free(host: str, port: int) -> None:
    """InputError where nothing can listen at an address."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port that was just left is free
        try:
            one.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot listen at {host}, port {port} ({error.strerror}): end what listens there, or write another "
                "port into every fleet.yaml"
            ) from error


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


def call(words: Sequence[str], home: Path, within: float = ANSWER) -> str:
    """Run one of Flower's commands to its end, for so many seconds at most; returns what it printed.

    Raises TrainingError with its words where it fails.
    """
    try:
        done = subprocess.run(
            words, env=environment(home), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=within
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
    words = node_words(place, options)
    check_files(override(FederatedConfig(), own_options(options, state) | {"dataset": options.dataset}, "fleet node"))
    node = Node(options, state, partial(say, console))
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
    """Run Flower's node until ``stopped``, and start it anew where it ends; close the desk where it is refused.

    It ends when a server that was started again does not know it any more, and has to introduce itself anew.
    """
    since = start = time.monotonic()  # since: the first of brief ones in a row
    while not stopped.is_set() and start - since < REFUSED:
        with Child(words, known) as child:
            while child.running and not stopped.wait(0.2):
                pass
        brief = time.monotonic() - start < BRIEF
        stopped.wait(PAUSE)
        start = time.monotonic()
        since = since if brief else start
    desk.close()


def node_words(place: Place, options: FleetNodeConfig) -> list[str]:
    """Words that start Flower's SuperNode for a client; InputError where its files are missing."""
    words = program("supernode", "--superlink", options.server or place.address, "--port", str(free_port()))
    if options.client >= place.clients:
        raise InputError(f"client {options.client}: the fleet's nodes are 0 to {place.clients - 1}")
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
