"""A fleet's folder: what ``fleet init`` writes, and server, nodes and runs read.

DIR/fleet.yaml            address of the server, number of clients, whether it is encrypted
DIR/certificates/         ca.crt for everybody; server.crt and server.key for the server alone
DIR/keys/                 client_K for node K alone; client_K.pub for the server
DIR/app/                  the app that runs are submitted as: pyproject.toml, two modules, config.yaml
DIR/README.md             what to do with it
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval, Predicate

from fedtalos.app.config.files import flatten, from_file, override, read_yaml
from fedtalos.app.config.fleet import FleetInitConfig
from fedtalos.app.config.schema import EditingConfig, FederatedConfig
from fedtalos.app.run.recorder import write_yaml
from fedtalos.errors import InputError
from fedtalos.facts import facts_from, read_file, schema
from fedtalos.files import write_atomic
from fedtalos.fleet.calibration import refuse_what_asks_no_client
from fedtalos.fleet.rounds import refuse_what_a_fleet_has_not
from fedtalos.fleet.templates import CLIENT_APP, PYPROJECT, README, SERVER_APP, WITH_TLS, WITHOUT_TLS

CONFIG, EDITING = "config.yaml", "editing.yaml"
"""Files beside the app: options of ``federated``, and of ``editing`` where a mask is made."""
MOST_NODES = 10_000
MOST_PEM = 2**20
"""Bytes of a certificate or key."""


def is_host(text: str) -> bool:
    """Tell whether text is an address, or a name of letters, digits, dots and dashes.

    >>> is_host("192.168.1.20")
    True
    """
    return re.fullmatch(r"[A-Za-z0-9.:_-]{1,255}", text) is not None


@schema
@dataclass(frozen=True)
class _About:
    """Facts of fleet.yaml."""

    host: Annotated[str, Predicate(is_host)]
    port: Annotated[int, Interval(ge=1, le=65535)]
    clients: Annotated[int, Interval(ge=1, le=MOST_NODES)]
    tls: bool


@dataclass(frozen=True)
class Place:
    """A fleet's folder, and what its fleet.yaml says.

    >>> Place.read(Path("fleet")).address
    '192.168.1.20:8000'
    """

    folder: Path
    host: str
    port: int
    clients: int
    tls: bool

    @classmethod
    def read(cls, folder: Path) -> "Place":
        """Read fleet.yaml; InputError where it is missing or does not say what it has to."""
        path = folder / "fleet.yaml"
        if not path.is_file():
            raise InputError(
                f"{folder}: is no fleet's folder, for it has no fleet.yaml; `fedtalos fleet init` makes one"
            )
        says = facts_from(_About, read_yaml(path), f"{path}: broken", "make the fleet anew")
        return cls(folder, **asdict(says))

    @property
    def address(self) -> str:
        """Host and port of the server, as nodes see it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def ca(self) -> Path:
        return self.folder / "certificates" / "ca.crt"

    @property
    def certificate(self) -> Path:
        return self.folder / "certificates" / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "certificates" / "server.key"

    def node_key(self, client: int) -> Path:
        """The private key of a node."""
        return self.folder / "keys" / f"client_{client}"

    @property
    def app(self) -> Path:
        return self.folder / "app"


def make_place(options: FleetInitConfig) -> Place:
    """Write a fleet's folder: an app, its config, certificates, keys and a page of instructions.

    Raises InputError where the folder is there already, or the config is not one of ``federated``.
    """
    folder = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists: move it away, or choose another")
    values = from_file(options.config, "federated")
    if values.get("partition") == "given":
        raise InputError(f"{options.config}: partition given: the nodes are the clients; take another, or leave it out")
    if values.get("num_clients") is None:
        raise InputError(f"{options.config}: expected num_clients, the number of nodes")
    config = override(FederatedConfig(), values, str(options.config))
    if config.split.num_clients > MOST_NODES:
        raise InputError(
            f"{options.config}: num_clients {config.split.num_clients}: expected {MOST_NODES} nodes at most"
        )
    try:
        refuse_what_a_fleet_has_not(config)
    except InputError as error:
        raise InputError(f"{options.config}: {error}") from error
    if not is_host(options.host):
        raise InputError(f"host {options.host!r}: expected an address, or a name of letters, digits, dots and dashes")
    theirs = (options.server_certificate, options.server_key, options.ca)
    if any(theirs) and (not all(theirs) or not options.tls):
        raise InputError("server_certificate, server_key and ca belong together, with tls; give all three, or none")
    for given in theirs:
        if given is not None and not given.is_file():
            raise InputError(f"{given}: no such file; give a certificate and its key in PEM, and that of their CA")
    place = Place(folder, options.host, options.port, config.split.num_clients, options.tls)
    if options.tls:
        from fedtalos.fleet.certificates import check_pair, make_certificates, make_node_key, write_secret
    if options.tls and not any(theirs):
        make_certificates(folder / "certificates", options.host)
    elif options.tls:
        check_pair(*(read_file(path, str(path), most=MOST_PEM) for path in theirs if path is not None))
        for mine, path in zip((place.certificate, place.server_key, place.ca), theirs, strict=True):
            assert path is not None
            write_secret(mine, read_file(path, str(path), most=MOST_PEM))
    if options.tls:
        for client in range(place.clients):
            make_node_key(folder / "keys", client)
    _write_app(place, {"on_bad_client": "skip", **absolute(values)})
    about = {"host": place.host, "port": place.port, "clients": place.clients, "tls": place.tls}
    write_yaml(folder / "fleet.yaml", about)
    page = {**about, "last": place.clients - 1, "folder": folder, "name": folder.resolve().name}
    page |= {"dataset": config.data.dataset, **(WITH_TLS if options.tls else WITHOUT_TLS)}
    write_atomic(folder / "README.md", README.format(**page))
    return place


def add_editing(place: Place, path: Path) -> None:
    """Put the options of ``editing`` beside the app, for a run that makes a mask of all nodes' scores.

    Raises InputError where they are none, or are of other clients than the fleet's.
    """
    values = {"calibration": "federated", "num_clients": place.clients, **from_file(path, "editing")}
    config = override(EditingConfig(), values, str(path))
    if config.split.num_clients != place.clients:
        raise InputError(f"{path}: num_clients {config.split.num_clients}: the fleet has {place.clients} nodes")
    try:
        refuse_what_asks_no_client(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    write_yaml(place.app / EDITING, absolute(values))


def absolute(values: dict[str, object]) -> dict[str, object]:
    """Options with the paths that are there written in full: a run is led from another folder."""
    found = dict(values)
    for option in ("data_dir", "mask", "weights", "head", "checkpoint", "cache_dir"):
        value = values.get(option)
        if isinstance(value, str) and (option == "data_dir" or Path(value).expanduser().exists()):
            found[option] = str(Path(value).expanduser().resolve())
    known = flatten(FederatedConfig())
    if "data_dir" not in values:
        found["data_dir"] = str(Path(known["data_dir"]).resolve())
    return found


def _write_app(place: Place, values: dict[str, object]) -> None:
    write_atomic(place.app / "pyproject.toml", PYPROJECT)
    write_atomic(place.app / "server_app.py", SERVER_APP)
    write_atomic(place.app / "client_app.py", CLIENT_APP)
    write_atomic(place.app / "LICENSE", "Apache-2.0\n")
    write_yaml(place.app / CONFIG, values)
