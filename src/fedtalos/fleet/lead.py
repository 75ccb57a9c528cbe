"""The server's side of a fleet's run, as Flower starts it: rounds of ``federated``, or a mask of ``editing``.

Torch and all else is imported once the app runs: Flower gives up on a program that is silent for its first half minute.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtalos.fleet.programs import serverapp

if TYPE_CHECKING:
    from fedtalos.app.config.schema import EditingConfig, FederatedConfig
    from fedtalos.fleet.gathering import Terms


def server_app(folder: Path) -> ServerApp:
    """Make the app that leads a run with the options in a folder, and the run config that it is submitted with.

    >>> app = server_app(Path(__file__).parent)
    """

    def lead(grid: Grid, context: Context) -> None:
        from rich.console import Console

        from fedtalos.app.config.schema import EditingConfig
        from fedtalos.app.run.display import say
        from fedtalos.app.run.folders import AlreadyFinished
        from fedtalos.fleet import editing
        from fedtalos.fleet.flower import GridPost
        from fedtalos.fleet.rounds import run_rounds

        config, terms = asked(folder, dict(context.run_config))
        console = Console()
        try:
            if isinstance(config, EditingConfig):
                editing.run(config, GridPost(grid), terms, console)
            else:
                run_rounds(config, GridPost(grid), terms, console)
        except AlreadyFinished as finished:
            say(console, str(finished))

    app = ServerApp()
    app.main()(lead)
    return app


def asked(folder: Path, run_config: dict[str, Any]) -> "tuple[FederatedConfig | EditingConfig, Terms]":
    """Read the options, and the terms of the fleet, that a run was submitted with."""
    from fedtalos.app.config.files import from_file, override
    from fedtalos.app.config.schema import EditingConfig, FederatedConfig
    from fedtalos.fleet.gathering import Terms
    from fedtalos.fleet.place import CONFIG, EDITING

    terms = Terms(**{name: run_config[name.replace("_", "-")] for name in Terms.__dataclass_fields__})
    given = {"output_dir": run_config["output-dir"], "resume": run_config["resume"]}
    given |= {"run_name": run_config["run-name"]} if run_config["run-name"] else {}
    if run_config["editing"]:
        path = folder / EDITING
        return override(EditingConfig(), from_file(path, "editing") | given, str(path)), terms
    path = folder / CONFIG
    return override(FederatedConfig(), from_file(path, "federated") | given, str(path)), terms


if __name__ == "__main__":
    serverapp(server_app)
