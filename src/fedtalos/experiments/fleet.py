"""The fleet command: set a fleet up, start its server and nodes, run rounds, or show it all on one machine."""

from rich.console import Console

from fedtalos.app.config.fleet import (
    FleetConfig,
    FleetDemoConfig,
    FleetInitConfig,
    FleetNodeConfig,
    FleetRunConfig,
    FleetServerConfig,
)
from fedtalos.app.run.display import say
from fedtalos.fleet.processes import require_flower


def run(config: FleetConfig, console: Console) -> None:
    """Do what the command line asks for."""
    require_flower()
    from fedtalos.fleet import commands, demo, submission
    from fedtalos.fleet.place import make_place

    match config.tool:
        case FleetInitConfig() as tool:
            place = make_place(tool)
            say(console, (place.folder / "README.md").read_text(encoding="utf-8").rstrip())
        case FleetServerConfig() as tool:
            commands.serve(tool, console)
        case FleetNodeConfig() as tool:
            commands.join(tool, console)
        case FleetRunConfig() as tool:
            submission.submit(tool, console)
        case FleetDemoConfig() as tool:
            demo.run_demo(tool, console)
