"""What stands between Flower's programs and ours: who may ask a SuperLink for what, and the desk of a node."""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from fedtalos.app.config.fleet import FleetInitConfig
from fedtalos.cli import parse
from fedtalos.errors import InputError, TrainingError
from fedtalos.fleet import commands, programs, submission
from fedtalos.fleet.desk import Desk, ask_desk
from fedtalos.fleet.letter import Letter
from fedtalos.fleet.place import Place, add_editing, make_place
from fedtalos.fleet.processes import by_hand, program
from fedtalos.fleet.programs import Ended, for_nodes_alone, in_one_sentence


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
    with pytest.raises(InputError, match=r"fleet\.yaml: broken \(host"):
        Place.read(tmp_path)
    config.write_text("dataset: digits\n")
    with pytest.raises(InputError, match="num_clients"):
        make_place(FleetInitConfig(folder=tmp_path / "fleet", config=config, tls=False))
    config.write_text("dataset: digits\nnum_clients: 1000000000\n")
    with pytest.raises(InputError, match="10000 nodes at most"):
        make_place(FleetInitConfig(folder=tmp_path / "fleet", config=config, tls=False))


def test_a_config_that_a_fleet_cannot_run_is_refused_when_it_is_set_up(tmp_path, config):
    for wrong, why in (("tasks: 2", "tasks"), ("head: linear", "head linear")):
        config.write_text(f"dataset: digits\nnum_clients: 2\n{wrong}\n")
        with pytest.raises(InputError, match=why):
            make_place(FleetInitConfig(folder=tmp_path / "fleet", config=config, tls=False))
    config.write_text("dataset: digits\nnum_clients: 2\n")
    with pytest.raises(InputError, match="expected an address"):
        make_place(FleetInitConfig(folder=tmp_path / "fleet", config=config, host="no host", tls=False))
    place = make_place(FleetInitConfig(folder=tmp_path / "fleet", config=config, tls=False))
    for wrong, why in (("num_clients: 3", "the fleet has 2 nodes"), ("calibration: central", "central")):
        config.write_text(f"dataset: digits\n{wrong}\n")
        with pytest.raises(InputError, match=why):
            add_editing(place, config)
    config.write_text("dataset: digits\n")
    add_editing(place, config)
    assert yaml.safe_load((place.app / "editing.yaml").read_text())["calibration"] == "federated"


def test_certificates_of_ones_own_have_to_be_a_pair(tmp_path, config):
    pytest.importorskip("cryptography")
    place = make_place(FleetInitConfig(folder=tmp_path / "made", config=config))
    given = {"server_certificate": place.certificate, "server_key": place.server_key, "ca": place.ca}
    make_place(FleetInitConfig(folder=tmp_path / "given", config=config, **given))
    assert (tmp_path / "given/certificates/server.crt").read_bytes() == place.certificate.read_bytes()
    with pytest.raises(InputError, match="unlocked PEM"):
        make_place(FleetInitConfig(folder=tmp_path / "other", config=config, **given | {"ca": config}))
    with pytest.raises(InputError, match="is not the key"):
        make_place(
            FleetInitConfig(folder=tmp_path / "other", config=config, **given | {"server_certificate": place.ca})
        )


@pytest.mark.parametrize(("error", "status"), [(InputError("give\nmore"), 2), (TrainingError("no more"), 1)])
def test_an_error_of_ours_comes_through_flower_as_it_was(error, status):
    ended = Ended(f"status {status}: {error}")
    read = Ended.read(f"ServerApp failed with exception: {ended}")
    assert (type(read), str(read)) == (type(error), str(error))
    assert Ended.read("ServerApp failed with exception: 'theta'") is None
    record = logging.LogRecord("flwr", 40, "", 0, "%s raised", ("x",), (type(ended), ended, None))
    assert in_one_sentence(record)
    assert (record.getMessage(), record.exc_info) == (str(ended), None)


def test_commands_in_the_docs_are_commands_that_there_are():
    page = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?:^    |command: |fedtalos-fleet )fedtalos (fleet .*)$", page, re.MULTILINE)
    assert len(commands) > 8
    for words in commands:
        parse(shlex.split(words))
    compose = re.search(r"^    services:\n(?:    .*\n)+", page, re.MULTILINE)
    assert compose
    services = yaml.safe_load(textwrap.dedent(compose[0]))["services"]
    assert services.keys() == {"server", "node0", "node1"}
    for service in services.values():
        assert service["image"] == "fedtalos-fleet"
        assert all(volume.split(":")[1].startswith("/data/") for volume in service["volumes"])


def test_a_program_whose_starter_has_ended_before_it_began_ends():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    words = [
        sys.executable,
        "-c",
        "import time; from fedtalos.fleet import programs; programs._end_with_parent(); time.sleep(60)",
    ]
    with subprocess.Popen(
        words, env={**os.environ, programs.PARENT: str(gone.pid)}, stderr=subprocess.DEVNULL
    ) as process:
        assert process.wait(20) != 0


def test_what_a_killed_program_started_ends_even_if_nobody_takes_leave_of_it():
    """The parent stays a zombie, as under a script that does not wait; its child and grandchild end."""
    child = (
        "import subprocess, time; from fedtalos.fleet import programs; programs._end_with_parent(programs._end_all); "
    )
    child += "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = psutil.Process(int(process.stdout.readline()))
        around = [grandchild, *grandchild.parents()[:1]]
        os.kill(process.pid, signal.SIGKILL)
        assert not psutil.wait_procs(around, timeout=20)[1]


def test_a_server_that_is_gone_is_no_run_that_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(submission, "flower", lambda *words: list(words))
    monkeypatch.setattr(
        submission, "call", lambda *_: '{"success": false, "error-message": "Connection is\\nunavailable"}'
    )
    with pytest.raises(TrainingError, match="Connection is unavailable"):
        submission.status_of("1", tmp_path)


@pytest.mark.parametrize(("lives", "until"), [([2.0] * 99, 90), ([2.0] * 5 + [500.0] + [2.0] * 99, 630)])
def test_a_node_is_tried_for_longer_than_its_killed_forerunner_is_taken_for_there(monkeypatch, lives, until):
    """Flower refuses it for 60 s. One that was there for long begins to count anew."""
    clock, left = [0.0], iter(lives)

    @contextlib.contextmanager
    def child(*_):
        clock[0] += next(left)
        yield SimpleNamespace(running=False)

    class Waits(threading.Event):
        def wait(self, seconds):
            clock[0] += seconds

    monkeypatch.setattr(commands, "Child", child)
    monkeypatch.setattr(commands.time, "monotonic", lambda: clock[0])
    closed = []
    commands._keep_running([], {}, SimpleNamespace(close=lambda: closed.append(clock[0])), Waits())
    assert until <= closed[0] < until + 10
