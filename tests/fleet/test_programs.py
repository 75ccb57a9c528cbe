"""What stands between Flower's programs and ours: who may ask a SuperLink for what, and the desk of a node."""

import asyncio
import threading
from pathlib import Path

import pytest

from fedtalos.app.config.fleet import FleetInitConfig
from fedtalos.errors import InputError
from fedtalos.fleet.desk import Desk, ask_desk
from fedtalos.fleet.letter import Letter
from fedtalos.fleet.place import Place, make_place
from fedtalos.fleet.processes import by_hand, program
from fedtalos.fleet.programs import for_nodes_alone


@pytest.mark.parametrize(
    ("host", "path", "answered"),
    [
        ("192.168.1.7", "/v1/fleet/register-node", True),
        ("192.168.1.7", "/v1/control/start-run", False),
        ("192.168.1.7", "/v1/fleet/../control/start-run", False),
        ("192.168.1.7", "/v1/runtime/push-messages", False),
        ("192.168.1.7", "/docs", False),
        ("127.0.0.1", "/v1/control/start-run", True),
        ("::1", "/v1/control/start-run", True),
        (None, "/v1/control/start-run", False),
        ("unix", "/v1/control/start-run", False),
    ],
)
def test_other_machines_reach_what_nodes_need_and_nothing_else(host, path, answered):
    asked, sent = [], []

    async def app(scope, receive, send):
        asked.append(scope["path"])

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "client": None if host is None else (host, 5)}
    asyncio.run(for_nodes_alone(app)(scope, None, send))
    assert bool(asked) is answered
    assert [message["status"] for message in sent[:1]] == ([] if answered else [403])


class Mirror:
    def answer(self, letter: Letter) -> Letter:
        return Letter("back", letter.facts, letter.arrays)


def test_a_desk_answers_those_that_have_its_key():
    with Desk() as desk:
        serving = threading.Thread(target=desk.serve, args=(Mirror(),))
        serving.start()
        assert Letter.read(ask_desk(Letter("hello", {"n": 1}).written(), desk.environment)).facts == {"n": 1}
        assert Letter.read(ask_desk(b"nonsense", desk.environment)).kind == "refused"
        with pytest.raises(Exception, match=r"digest|auth|rejected"):
            ask_desk(b"", {**desk.environment, "FEDTALOS_DESK_KEY": 64 * "0"})
        desk.close()
        serving.join(10)
        assert not serving.is_alive()
    with pytest.raises(InputError, match="fedtalos fleet node"):
        ask_desk(b"", {})


def test_commands_are_printed_as_hands_type_them():
    assert by_hand(program("superlink", "--port", "8000")) == "flower-superlink --port 8000"


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "federated.yaml"
    path.write_text("dataset: digits\nnum_clients: 2\n")
    return path


def test_a_fleets_folder_has_what_machines_need(tmp_path, config):
    x509 = pytest.importorskip("cryptography.x509")
    options = FleetInitConfig(folder=tmp_path / "fleet", config=config, host="192.168.1.20")
    place = make_place(options)
    assert Place.read(place.folder) == place
    assert place.address == "192.168.1.20:8000"
    for secret in (place.server_key, place.node_key(0), place.node_key(1)):
        assert secret.stat().st_mode & 0o077 == 0
    ca, server = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (place.ca, place.certificate))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "192.168.1.20" in [str(name.value) for name in names]
    assert {path.name for path in place.app.iterdir()} == {
        "pyproject.toml", "server_app.py", "client_app.py", "config.yaml", "LICENSE"
    }  # fmt: skip
    with pytest.raises(InputError, match="exists"):
        make_place(options)


def test_a_folder_or_config_that_is_none_is_refused(tmp_path, config):
    with pytest.raises(InputError, match=r"no fleet\.yaml"):
        Place.read(tmp_path)
    (tmp_path / "fleet.yaml").write_text("host: 7\n")
    with pytest.raises(InputError, match="expected host, port, clients, tls"):
        Place.read(tmp_path)
    config.write_text("dataset: digits\n")
    with pytest.raises(InputError, match="num_clients"):
        make_place(FleetInitConfig(folder=tmp_path / "fleet", config=config, tls=False))
