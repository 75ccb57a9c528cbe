"""The two apps that Flower runs: the server's, which leads a run, and a node's, which hands letters to its desk."""

from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtalos.fleet.desk import ask_desk
from fedtalos.fleet.flower import GridPost, letter_of, record_of
from fedtalos.fleet.letter import Letter

CONFIG = "config.yaml"
"""File beside the app with the options of ``federated``."""

client_app = ClientApp()


@client_app.query("letter")
def answer_letter(message: Message, _context: Context) -> Message:
    """Have the desk answer a letter."""
    answer = Letter.read(ask_desk(letter_of(message.content).written()))
    return Message(record_of(answer), reply_to=message)


def server_app(folder: Path) -> ServerApp:
    """Make the app that leads a run with the config in a folder, and the run config that it is submitted with.

    >>> app = server_app(Path(__file__).parent)
    """
    app = ServerApp()

    @app.main()
    def lead(grid: Grid, context: Context) -> None:
        from rich.console import Console  # with torch and all else, which nodes do without

        from fedtalos.fleet.rounds import run_rounds

        config, terms = asked(folder / CONFIG, dict(context.run_config))
        run_rounds(config, GridPost(grid), terms, Console())

    return app


def asked(path: Path, run_config: dict[str, Any]) -> tuple[Any, Any]:
    """Read the options of ``federated``, and the terms of the fleet, that a run was submitted with."""
    from fedtalos.app.config.files import from_file, override
    from fedtalos.app.config.schema import FederatedConfig
    from fedtalos.fleet.rounds import Terms

    terms = Terms(**{name: run_config[name.replace("_", "-")] for name in Terms.__dataclass_fields__})
    values = from_file(path, "federated")
    values |= {"output_dir": run_config["output-dir"], "resume": run_config["resume"]}
    values |= {"run_name": run_config["run-name"]} if run_config["run-name"] else {}
    return override(FederatedConfig(), values, str(path)), terms
