"""Every option of the fleet commands: set a fleet up, and start its server, nodes and runs (docs/fleet.md)."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field, SkipValidation

from fedtalos.app.config.dataset import Dataset
from fedtalos.app.config.options import DEVICE, Device, Options, by_command, unset

Work = Literal["train", "evaluate", "head", "score", "weigh"]
"""Work that a server may ask of a node."""
Wire = Literal["float32", "float16", "bfloat16", "int8"]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
PORT = 8000


class FleetInitConfig(Options):
    """Write a fleet's folder: an app, a config, certificates, keys and a page of instructions."""

    command: ClassVar[str] = "init"

    folder: Folder = Field(description="folder to make")
    config: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Field(
        description="YAML file with options of `federated`; num_clients is the number of nodes"
    )
    host: str = Field("127.0.0.1", description="name or address of the server's machine, as the nodes see it")
    port: int = Field(PORT, ge=1, le=65535, description="port of the server")
    tls: bool = Field(True, description="encrypt, with certificates of its own CA; without it anybody can listen in")
    server_certificate: Annotated[Path | None, unset("FILE", "made, with a CA of its own")] = Field(
        None, description="certificate of the server's machine, in PEM; its key and its CA are given beside it"
    )
    server_key: Annotated[Path | None, unset("FILE", "made")] = Field(None, description="the certificate's private key")
    ca: Annotated[Path | None, unset("FILE", "made")] = Field(None, description="certificate of the CA that signed it")


class FleetServerConfig(Options):
    """Start Flower's SuperLink on this machine, admit the fleet's nodes, and serve until Ctrl-C."""

    command: ClassVar[str] = "server"

    folder: Folder = Field(description="the fleet's folder, made by init")
    listen: str = Field("0.0.0.0", description="address to listen at")


class FleetNodeConfig(Options):
    """Start a node: it keeps its images, and trains one client where the server asks for it."""

    command: ClassVar[str] = "node"

    folder: Folder = Field(description="the fleet's folder, or a copy of its ca.crt, fleet.yaml and this node's key")
    client: int = Field(ge=0, description="number of the client that this node is, from 0")
    dataset: Dataset = Field(description="the one data set that the node trains on; hf:OWNER/NAME, too")
    data_dir: Path = Field(Path("data"), description="where its images are")
    holds: Literal["all", "part"] = Field(
        "all",
        description="training images in data_dir that are this client's: all, or part: to try out, what a simulation "
        "gives to it",
    )
    admit: Annotated[tuple[Work, ...], tyro.conf.arg(help_behavior_hint="(default: all of it)")] = Field(
        ("train", "evaluate", "head", "score", "weigh"),
        description="work that the node does; it refuses what is left out",
    )
    server: Annotated[str | None, unset("HOST:PORT", "that of fleet.yaml")] = Field(
        None, description="address of the server"
    )
    state_dir: Annotated[Path | None, unset("DIR", "DIR/state/client_K")] = Field(
        None, description="where the node keeps the frozen weights, masks and its own vectors between rounds"
    )
    device: Device = Field("auto", description=DEVICE)
    threads: Annotated[int | None, unset("N", "all cores")] = Field(
        None, ge=1, le=1024, description="CPU threads; for the bytes of a simulation take its number of threads"
    )


class FleetRunConfig(Options):
    """Submit a run to the server, rounds or a mask, show it, and say where its results are."""

    command: ClassVar[str] = "run"

    folder: Folder = Field(description="the fleet's folder, made by init")
    run_name: Annotated[str | None, unset("NAME", "fleet and time")] = Field(
        None, description="name of the run, and of its folders"
    )
    resume: bool = Field(False, description="continue the run called --run_name, or else the newest unfinished one")
    output_dir: Annotated[Path | None, unset("DIR", "DIR/runs")] = Field(
        None, description="folder on the server's machine for results/, checkpoints/ and plots/"
    )
    editing: Annotated[Path | None, unset("FILE", "train by the fleet's config")] = Field(
        None, description="YAML file with options of `editing`: make a mask from all nodes' scores, and train nothing"
    )
    deadline: float = Field(600.0, gt=0, le=86400, description="seconds until a node's answer counts as lost")
    patience: float = Field(120.0, ge=0, le=86400, description="seconds to wait for all nodes before the first round")
    min_nodes: int = Field(1, ge=1, description="fewest nodes to begin with once the patience is over")
    wire: Wire = Field(
        "float32", description="kind of number that updates travel as; what fewer bits lose is added to the next update"
    )


class FleetDemoConfig(Options):
    """Start a server and three nodes on this machine, train ten rounds with a mask on digits, and stop them."""

    command: ClassVar[str] = "demo"

    output_dir: Path = Field(Path(), description="folder for results/, checkpoints/, masks/ and plots/")
    run_name: Annotated[str | None, unset("NAME", "fleet and time")] = Field(None, description="name of the run")
    num_rounds: int = Field(10, ge=1, description="number of rounds")
    seed: int = Field(0, ge=0, description="seed of the random draws")
    wire: Wire = Field("float32", description="kind of number that updates travel as")


FleetTool = FleetInitConfig | FleetServerConfig | FleetNodeConfig | FleetRunConfig | FleetDemoConfig
FLEET_TOOLS: dict[str, type[FleetTool]] = by_command(FleetTool)


class FleetConfig(Options):
    """Train over machines that keep their images, by Flower: set up, serve, join and run (docs/fleet.md)."""

    command: ClassVar[str] = "fleet"

    tool: SkipValidation[FleetTool]
