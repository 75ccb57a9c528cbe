"""Flower's own programs, with three things taken from them: nothing that a fleet's machines run comes from the network.

Flower sends an app's code to every node, which runs it, and whoever reaches a SuperLink's port may submit an app. Here
nodes and server run the code that is installed on them, whatever an app holds, and a SuperLink takes runs and
registrations from its own machine alone. This module knows names inside flwr 1.41 and 1.42; tests hold them.
"""

import ipaddress
import os
import sys
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Scope = dict[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]

OPEN_TO_NODES = "/v1/fleet/"
"""Beginnings of the paths that other machines may ask of a SuperLink."""


def superlink() -> None:
    """Run flower-superlink; other machines reach what nodes need of it, and nothing else."""
    program: Any = import_module("flwr.superlink.cli.flower_superlink")
    run = program.uvicorn.run
    program.uvicorn.run = lambda app, **options: run(app=for_nodes_alone(app), **options)
    _end_with_parent()
    program.flower_superlink()


def supernode() -> None:
    """Run flower-supernode, and end with the process that started it."""
    _end_with_parent()
    import_module("flwr.supernode.cli.flower_supernode").flower_supernode()


def clientapp() -> None:
    """Run flwr-clientapp with our app, whatever the server sent."""
    runtime: Any = import_module("flwr.supernode.runtime.run_clientapp")
    from fedtalos.fleet.app import client_app

    _end_with_parent()
    runtime.install_from_fab = lambda *_, **__: None
    runtime.get_load_client_app_fn = lambda **_: lambda *_: client_app
    import_module("flwr.supernode.cli.flwr_clientapp").flwr_clientapp()


def serverapp() -> None:
    """Run flwr-serverapp with our app, and of the one that was submitted its config alone."""
    runtime: Any = import_module("flwr.superlink.runtime.run_serverapp")
    from fedtalos.fleet.app import server_app

    def run(*, grid: Any, context: Any, server_app_dir: str, server_app_attr: str) -> Any:  # noqa: ARG001
        server_app(Path(server_app_dir))(grid=grid, context=context)
        return context

    runtime.run_ = run
    _end_with_parent()  # else it looks for a killed SuperLink for ever, and holds the run
    import_module("flwr.superlink.cli.flwr_serverapp").flwr_serverapp()


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


def _end_with_parent() -> None:
    """End this program soon after the one that started it has ended, however that came."""
    import_module("flwr.supercore.app_utils").start_parent_process_monitor(os.getppid())


PROGRAMS = {
    "superlink": superlink,
    "supernode": supernode,
    "clientapp": clientapp,
    "serverapp": serverapp,
    "register": register,
}

if __name__ == "__main__":
    program = PROGRAMS[sys.argv.pop(1)]
    program()
