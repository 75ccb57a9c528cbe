"""A real fleet on loopback, over Flower with TLS and node keys: minutes, so marked slow, and only where Flower is.

pip install -c fleet-constraints.txt -e '.[fleet]' pytest hypothesis && pytest -m slow tests/fleet
"""

import csv
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from test_contract import assert_same

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.fleet import FleetRunConfig
from fedtalos.app.run.recorder import write_yaml
from fedtalos.cli import main
from fedtalos.errors import InputError

pytest.importorskip("cryptography")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (Path(sys.executable).parent / "flwr").exists(), reason="Flower is not installed here"),
    pytest.mark.usefixtures("in_a_folder_of_its_own"),
    pytest.mark.filterwarnings("ignore"),
]

OPTIONS = {
    "dataset": "digits",
    "model_size": "micro",
    "image_size": 8,
    "patch_size": 4,
    "weights": "none",
    "head": "random",
    "train_limit": 300,
    "eval_limit": 40,
    "num_clients": 3,
    "client_fraction": 1.0,
    "num_rounds": 3,
    "local_steps": 2,
    "batch_size": 16,
    "eval_every": 2,
    "threads": 1,
    "device": "cpu",
}
QUIET = Console(quiet=True)


def words(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", *([] if value is True else [str(value)]))]


@contextmanager
def nothing_left():
    """Whatever was started inside has ended when the block is left."""
    before = {process.pid for process in psutil.process_iter()}
    yield
    time.sleep(1)
    ours = ("fedtalos", "flower", "flwr")
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        left = process.pid not in before and any(word in line for word in ours) and str(Path.cwd()) in line
        assert not left, line


def run(place, name="fleet", **options) -> None:
    from fedtalos.fleet.submission import submit

    submit(FleetRunConfig(folder=place.folder, run_name=name, output_dir=Path(), **options), QUIET)


def summary(name="fleet") -> dict:
    return read_yaml(Path("results", name, "summary.yaml"))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mask": "masks/m.safetensors", "algorithm": "scaffold", "optimizer": "sgd", "dropout_rate": 0.3},
        {"one_shot": True, "head": "ridge", "merge": "fisher"},
    ],
)
def test_a_fleet_on_loopback_gives_the_bytes_of_a_simulation(more):
    from fedtalos.fleet.demo import fleet, make_random_mask

    make_random_mask(Path("masks/m.safetensors"), seed=0)
    options = OPTIONS | more
    if "one_shot" in more:
        del options["num_rounds"], options["client_fraction"]
    main(["federated", "--run_name", "alone", "--on_bad_client", "skip", *words(options)])
    with nothing_left(), fleet(Path("place"), options, QUIET) as place:
        run(place, patience=600, min_nodes=3)  # a busy machine takes minutes to have them all
    assert_same("alone", "fleet")


def train_rows(name: str) -> list[dict[str, str]]:
    """A run's rows of training, as far as it has come."""
    try:
        with Path("results", name, "metrics.csv").open() as lines:
            return [row for row in csv.DictReader(lines) if row["split"] == "train"]
    except FileNotFoundError:
        return []


def round_seconds(name: str) -> list[float]:
    """Seconds of each round after the first."""
    ends = [float(row["seconds"]) for row in train_rows(name)]
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def test_nodes_are_killed_at_random_and_the_run_ends():
    """30 kills of nodes that come back: no round hangs, and once they are over nobody is missing.

    A round may last until its deadline, after waiting for a node to be there again, which has a deadline of its own.
    """
    from fedtalos.fleet import demo
    from fedtalos.fleet.commands import server
    from fedtalos.fleet.members import GRACE, SMALL
    from fedtalos.fleet.processes import Child

    rounds, kills, rng = 16, 30, random.Random(0)
    with nothing_left(), ExitStack() as stack:
        place = demo.set_up(Path("place"), OPTIONS)
        stack.enter_context(server(place, QUIET, log=Path("server.log")))

        def start(client: int) -> Child:
            command = demo.node_command(place, client, ["--dataset", "digits", "--holds", "part"])
            return stack.enter_context(Child(command, demo.child_environment(), Path(f"node_{client}.log")))

        nodes = [start(client) for client in range(place.clients)]
        run(place, "peace", patience=600)
        pace = max(round_seconds("peace"))
        write_yaml(place.app / "config.yaml", read_yaml(place.app / "config.yaml") | {"num_rounds": rounds})
        command = [sys.executable, "-m", "fedtalos", "fleet", "run", str(place.folder), "--run_name", "fleet"]
        command += ["--output_dir", str(Path.cwd()), "--deadline", str(3 * pace), "--patience", "600"]
        leading = stack.enter_context(Child(command, os.environ, Path("run.log")))
        while not train_rows("fleet"):
            assert leading.running, leading.tail(20)
            time.sleep(0.2)
        for _ in range(kills):  # in the time of 12 rounds of peace, and each makes a round longer
            time.sleep(rng.uniform(0, 0.8 * pace))
            assert leading.running, leading.tail(20)
            client = rng.randrange(place.clients)
            nodes[client].process.kill()
            nodes[client] = start(client)
        assert leading.wait() == 0, leading.tail(20)
    rows, said = train_rows("fleet"), summary()
    assert said["rounds"] == len(rows) == rounds
    assert max(round_seconds("fleet")) < SMALL + 3 * pace + GRACE
    assert rows[-1]["examples"] == train_rows("peace")[-1]["examples"]


def test_a_run_goes_on_after_its_server_was_killed():
    from fedtalos.fleet import demo
    from fedtalos.fleet.commands import server
    from fedtalos.fleet.processes import Child

    options = OPTIONS | {"num_rounds": 6}
    main(["federated", "--run_name", "alone", "--on_bad_client", "skip", *words(options)])
    with nothing_left(), ExitStack() as stack:
        place = stack.enter_context(demo.fleet(Path("place"), options, QUIET))
        command = [sys.executable, "-m", "fedtalos", "fleet", "run", str(place.folder), "--run_name", "fleet"]
        leading = stack.enter_context(Child([*command, "--output_dir", str(Path.cwd())], os.environ, Path("run.log")))
        while (
            not Path("checkpoints/fleet/last.json").exists()
            or "\n2," not in Path("results/fleet/metrics.csv").read_text()
        ):
            assert leading.running, leading.tail(20)
            time.sleep(0.2)
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "fedtalos.fleet.programs" in line and "superlink" in line and str(place.port) in line:
                process.send_signal(signal.SIGKILL)
                process.wait(10)  # it is our child: others still see it until somebody has taken leave of it
        assert leading.wait() == 1
        stack.enter_context(server(place, QUIET, log=Path("again.log")))
        run(place, resume=True, patience=600, min_nodes=3)
    assert_same("alone", "fleet")


def test_a_node_that_is_not_registered_is_refused():
    from fedtalos.fleet import demo
    from fedtalos.fleet.certificates import make_node_key
    from fedtalos.fleet.commands import server

    with nothing_left(), ExitStack() as stack:
        place = demo.set_up(Path("place"), OPTIONS)
        stack.enter_context(server(place, QUIET, log=Path("server.log")))
        make_node_key(place.folder / "keys", 0)  # another key than the one that the server was told of
        command = demo.node_command(place, 0, ["--dataset", "digits", "--holds", "part"])
        done = subprocess.run(command, env=demo.child_environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 1
    assert "refuses this node" in done.stderr


def test_code_that_a_server_sends_is_not_run():
    """An app that would write a file leads its run by our code, and nodes answer by theirs."""
    from fedtalos.fleet.demo import fleet

    with nothing_left(), fleet(Path("place"), OPTIONS | {"num_rounds": 1}, QUIET) as place:
        for module in ("client_app.py", "server_app.py"):
            (place.app / module).write_text(f"open({str(Path('pwned').resolve())!r}, 'w')\napp = None\n")
        run(place)
    assert summary()["rounds"] == 1
    assert not Path("pwned").exists()


def test_a_demo_that_is_stopped_leaves_nothing_running():
    command = [sys.executable, "-m", "fedtalos", "fleet", "demo", "--num_rounds", "50", "--run_name", "demo"]
    with nothing_left():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        while not Path("results/demo/metrics.csv").exists():
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not [
        left for left in psutil.process_iter(["cmdline"]) if "fedtalos-fleet-" in " ".join(left.info["cmdline"] or [])
    ]


def test_a_run_that_fails_says_so():
    """The sentence comes through Flower, as the kind of error that it was."""
    from fedtalos.fleet.demo import fleet

    with nothing_left(), fleet(Path("place"), OPTIONS, QUIET) as place:
        options = place.app / "config.yaml"
        write_yaml(options, read_yaml(options) | {"head": "linear"})  # `fleet init` would have refused it
        with pytest.raises(InputError, match="a fleet does not train it alone"):
            run(place)
