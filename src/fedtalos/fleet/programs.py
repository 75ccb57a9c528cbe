"""Flower's own programs, with three things taken from them: nothing that a fleet's machines run comes from the network.

Flower sends an app's code to every node, which runs it, and whoever reaches a SuperLink's port may submit an app. Here
nodes and server run the code that is installed on them, whatever an app holds, and a SuperLink takes runs and
registrations from its own machine alone. This module knows names inside flwr 1.41 and 1.42; tests hold them.
"""

import ipaddress
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fedtalos.errors import InputError, TrainingError

Scope = dict[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]

PARENT = "FEDTALOS_PARENT"
"""Environment variable with the process that starts a program, and with which it ends."""
PATIENCE = 15
"""Seconds that a program has to save what it has."""
OPEN_TO_NODES = "/v1/fleet/"
"""Beginnings of the paths that other machines may ask of a SuperLink."""


def superlink() -> None:
    """Run flower-superlink; other machines reach what nodes need of it, and nothing else."""
    program: Any = import_module("flwr.superlink.cli.flower_superlink")
    run = program.uvicorn.run
    program.uvicorn.run = lambda app, **options: run(app=for_nodes_alone(app), **options)
    _end_with_parent(_end_all)
    program.flower_superlink()


def supernode() -> None:
    """Run flower-supernode, and end with the process that started it."""
    _end_with_parent(_end_all)
    import_module("flwr.supernode.cli.flower_supernode").flower_supernode()


def clientapp() -> None:
    """Run flwr-clientapp with our app, whatever the server sent."""
    runtime: Any = import_module("flwr.supernode.runtime.run_clientapp")
    from fedtalos.fleet.app import client_app

    _end_with_parent()
    runtime.install_from_fab = lambda *_, **__: None
    runtime.get_load_client_app_fn = lambda **_: lambda *_: client_app
    import_module("flwr.supernode.cli.flwr_clientapp").flwr_clientapp()


def serverapp(app_of: Callable[[Path], Any]) -> None:
    """Run flwr-serverapp with our app, made for the folder of the one that was submitted; that one is not run."""
    runtime: Any = import_module("flwr.superlink.runtime.run_serverapp")

    def run(*, grid: Any, context: Any, server_app_dir: str, server_app_attr: str) -> Any:  # noqa: ARG001
        try:
            app_of(Path(server_app_dir))(grid=grid, context=context)
        except (InputError, TrainingError) as error:
            raise Ended(f"status {2 if isinstance(error, InputError) else 1}: {error}") from None
        return context

    runtime.run_ = run
    logging.getLogger("flwr").addFilter(in_one_sentence)
    _end_with_parent()  # else it looks for a killed SuperLink for ever, and holds the run
    import_module("flwr.superlink.cli.flwr_serverapp").flwr_serverapp()


class Ended(Exception):  # noqa: N818  it is read by people
    """A run's end by an error of ours, as the status that ``fleet run`` is to exit with, and a sentence."""

    @staticmethod
    def read(details: str) -> InputError | TrainingError | None:
        """Read the error from what Flower says of a run that failed; None where it ended by another."""
        found = re.search(r"status ([12]): (.*)", details, re.DOTALL)
        return None if found is None else {"1": TrainingError, "2": InputError}[found[1]](found[2].strip())


def in_one_sentence(record: logging.LogRecord) -> bool:
    """Have Flower log an end by an error of ours without the way there."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, Ended):
        record.msg, record.args, record.exc_info = str(error), (), None
    return True


def register() -> None:
    """Tell the SuperLink of this machine of nodes by their public keys: `flwr supernode register`, several at once."""
    app = import_module("flwr.cli.app").app
    for key in sys.argv[1:]:
        app(["supernode", "register", key, "fleet"], standalone_mode=False)


def for_nodes_alone(app: Asgi) -> Asgi:
    """Let other machines ask for what nodes need, and answer 403 to anything else."""

    async def guarded(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or _is_here(scope) or _for_nodes(str(scope["path"])):
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"this is for the server's own machine"})

    return guarded


def _for_nodes(path: str) -> bool:
    return path.startswith(OPEN_TO_NODES) and ".." not in path


def _is_here(scope: Scope) -> bool:
    host = (scope.get("client") or ("",))[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _end() -> None:
    """Stop this program as Ctrl-C does, so that it saves what it has; kill it where that is ignored."""
    os.kill(os.getpid(), signal.SIGINT)  # unlike raise_signal it wakes the main thread
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_with_parent(end: Callable[[], None] = _end) -> None:
    """End this program soon after the one that started it has ended, however that came, and even if nobody notes it.

    That may have been before this program had read its own modules, so its starter tells it who it is.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        end()

    threading.Thread(target=watch, daemon=True).start()


def _end_all() -> None:
    """Kill this program and all that it started.

    What a killed node leaves running would go on taking letters, with nobody at the desk, and keep its successor out.
    """
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


PROGRAMS = {
    "superlink": superlink,
    "supernode": supernode,
    "clientapp": clientapp,
    "register": register,
}

if __name__ == "__main__":
    program = PROGRAMS[sys.argv.pop(1)]
    program()
