"""Nodes that fail, lie or come back: the rounds go on without them, and what is lost is counted."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from local_post import LocalPost
from rich.console import Console
from test_contract import assert_same, federated, in_a_fleet, nodes

from fedtalos._version import __version__
from fedtalos.cli import main, parse
from fedtalos.errors import BadUpdateError, InputError
from fedtalos.fleet import one_shot, rounds
from fedtalos.fleet.engine import read_update
from fedtalos.fleet.frozen import sha256
from fedtalos.fleet.gathering import Terms
from fedtalos.fleet.in_process import InProcess
from fedtalos.fleet.letter import Letter
from fedtalos.fleet.members import Members
from fedtalos.fleet.node import Node
from fedtalos.fleet.post import NoAnswer
from fedtalos.fleet.rounds import run_rounds
from fedtalos.training.editing.vector_file import load_vector
from fedtalos.training.federated.fedavg import Lost

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")

EVERYBODY = "--client_fraction 1 --on_bad_client skip"


def left_out() -> dict[str, int]:
    return yaml.safe_load(Path("results/fleet/summary.yaml").read_text()).get("clients_left_out", {})


def test_reasons_that_are_counted_are_the_servers_own():
    """A node could send any, which no checkpoint would take."""
    for why in ("a\nb", "x" * 1001):
        lost = read_update(Letter("lost", {"why": why, "sent": False}), None, None, replies=False)
        assert lost == Lost("lost on its node")


def test_a_node_whose_disk_takes_nothing_says_so():
    content, said = b"a model", []
    Path("state").write_text("no folder")
    node = Node(nodes()[0].options, Path("state"), said.append)
    letter = Letter("begin", {"still": sha256(content)}, {"still": np.frombuffer(content, np.uint8)})
    answer = node.answer(letter)
    assert answer.kind == "refused"
    assert "state" in answer.facts["why"]
    assert said == [f"refused 'begin': {answer.facts['why']}"]


def test_a_node_that_is_late_for_one_model_begins_anew_for_the_next():
    """Its old "begun" comes when the head has been fitted: it would train through the head before."""

    class Late(InProcess):
        held = False

        def collect(self, tickets):
            return {} if self.held else super().collect(tickets)

    class Ready:
        def answer(self, letter: Letter) -> Letter:
            if letter.kind == "hello":
                return Letter("hello", {"client": 0, "version": __version__})
            return Letter("begun", {"run": letter.facts["head"], "images": 5})

    post = Late([Ready()])
    members = Members(post, 1, deadline=60)
    members.prepare(Letter("begin", {"head": "random"}), b"")
    members.refresh()  # it has said hello, and is to begin
    post.held = True
    members.prepare(Letter("begin", {"head": "ridge"}), b"")
    post.held = False
    members.gather(patience=5)
    assert members.by_client[0].run == "ridge"


class Failing(LocalPost):
    """Node 101, which is client 1, does ``instead`` in its second round."""

    def __init__(self, instead) -> None:
        super().__init__(nodes())
        self.instead = instead

    def answer(self, number: int, letter: Letter) -> Letter | NoAnswer:
        if number == 101 and letter.kind == "train" and letter.facts["round"] == 2:
            return self.instead(self, letter)
        return super().answer(number, letter)


def changed(**arrays: np.ndarray):
    """An honest answer, with other arrays."""

    def instead(post: Failing, letter: Letter) -> Letter:
        answer = post.by_number[101].answer(letter)
        return replace(answer, arrays=answer.arrays | arrays)

    return instead


def said(**facts: object):
    """An honest answer, with other facts."""

    def instead(post: Failing, letter: Letter) -> Letter:
        answer = post.by_number[101].answer(letter)
        return replace(answer, facts=answer.facts | facts)

    return instead


@pytest.mark.parametrize(
    ("instead", "counted"),
    [
        (lambda post, letter: NoAnswer("stopped"), "no answer"),
        (lambda post, letter: Letter("refused", {"why": "no"}), "refused"),
        (lambda post, letter: Letter("unprepared"), "refused"),
        (lambda post, letter: Letter("nonsense"), "bad update"),
        (changed(values=np.full(600_000, np.nan, np.float32)), "bad update"),
        (changed(values=np.zeros((2, 3), np.float32)), "bad update"),
        pytest.param(changed(values=np.zeros(5, np.int8)), "bad update", marks=pytest.mark.slow),
        (said(examples=-3), "bad update"),
        pytest.param(said(loss_sum="much"), "bad update", marks=pytest.mark.slow),
        pytest.param(said(loss_sum=float("nan")), "bad update", marks=pytest.mark.slow),
    ],
)
def test_a_round_goes_on_without_a_node_that_fails_or_lies(instead, counted):
    in_a_fleet(EVERYBODY, post=Failing(instead))
    assert left_out() == {counted: 1}


def test_values_that_are_not_finite_are_refused():
    def instead(post, letter):
        answer = post.by_number[101].answer(letter)
        return replace(answer, arrays={"values": np.full_like(answer.arrays["values"], np.inf)})

    in_a_fleet(EVERYBODY, post=Failing(instead))
    assert left_out() == {"bad update": 1}


def test_a_lost_node_is_as_a_client_that_drops_out():
    """The sum of the others is that of a simulation in which the same client sends nothing."""
    drops_out = "--client_fraction 1 --dropout_rate 0.3 --seed 5"
    main(federated("alone", drops_out))
    in_a_fleet(drops_out)
    assert_same("alone", "fleet")


def test_a_bad_update_stops_the_run_where_it_is_to():
    post = Failing(changed(values=np.zeros(5, np.float32)))
    with pytest.raises(BadUpdateError, match="round 2, client 1"):
        in_a_fleet("--client_fraction 1", post=post)


def test_a_node_that_was_killed_comes_back_with_what_is_on_its_disk():
    """It goes on in the run with its number and its wire's losses; nothing is sent anew."""

    def instead(post: Failing, letter: Letter) -> Letter:
        post.by_number[101] = nodes()[1]  # a new process, the old disk
        return post.by_number[101].answer(letter)

    post = Failing(instead)
    in_a_fleet("--client_fraction 1", post=post, terms=Terms(patience=60, wire="int8"))
    returned = Path("checkpoints/fleet").glob("last-*.safetensors")
    kept = next(returned).read_bytes()
    assert left_out() == {}
    Path("results/fleet").rename("results/kept")
    Path("checkpoints/fleet").rename("checkpoints/kept")
    shutil.rmtree("state")
    in_a_fleet("--client_fraction 1", terms=Terms(patience=60, wire="int8"))
    assert next(Path("checkpoints/fleet").glob("last-*.safetensors")).read_bytes() == kept


def test_a_node_whose_disk_is_lost_is_made_ready_anew():
    def instead(post: Failing, letter: Letter) -> Letter:
        post.by_number[101] = Node(nodes()[1].options, Path("state/new"))
        return post.by_number[101].answer(letter)

    in_a_fleet(f"{EVERYBODY} --num_rounds 5", post=Failing(instead))
    assert left_out() == {"refused": 1, "no node": 1}  # it is greeted and begins while a round goes on


def test_a_run_waits_for_its_nodes_and_no_longer_than_its_patience():
    with pytest.raises(InputError, match="0 of 4 nodes are there"):
        in_a_fleet(post=LocalPost([]), terms=Terms(patience=0.2))


class Renumbered(LocalPost):
    """Node 101 is killed after round 1, and comes back as 201 while the network still lists 101."""

    def nodes(self) -> set[int]:
        if any(letter.kind == "update" for letter in self.seen):
            self.by_number[201] = self.by_number[101]
        return super().nodes()

    def answer(self, number: int, letter: Letter) -> Letter | NoAnswer:
        gone = number == 101 and 201 in self.by_number
        return NoAnswer("stopped") if gone else super().answer(number, letter)


def test_a_node_that_comes_back_with_another_number_takes_part_again():
    in_a_fleet(f"{EVERYBODY} --num_clients 2 --num_rounds 4", post=Renumbered(nodes(2)))
    assert left_out() == {"no answer": 1}


class Away(LocalPost):
    """All nodes are away for so many looks at the network, from the end of round 1 on."""

    def __init__(self, looks: int) -> None:
        super().__init__(nodes(2))
        self.looks = looks

    def nodes(self) -> set[int]:
        away = bool(self.looks) and any(letter.kind == "update" for letter in self.seen)
        self.looks -= away
        return set() if away else super().nodes()


TWO = f"{EVERYBODY} --num_clients 2 --num_rounds 2"


def test_rounds_do_not_pass_while_everybody_is_away():
    with pytest.raises(InputError, match="0 of 2 nodes are there after"):
        in_a_fleet(TWO, post=Away(1000), terms=Terms(patience=0.2))
    in_a_fleet(f"{TWO} --resume", post=Away(0))
    assert left_out() == {}


def test_a_round_waits_for_nodes_that_are_away_for_a_while():
    in_a_fleet(TWO, post=Away(5), terms=Terms(patience=60, min_nodes=2))
    assert left_out() == {}


def test_a_run_goes_on_without_nodes_that_never_came():
    in_a_fleet(EVERYBODY, post=LocalPost(nodes()[:3]), terms=Terms(patience=1))
    assert left_out() == {"no node": 3}


def test_a_client_that_comes_late_counts_from_then_on():
    class Late(LocalPost):
        def answer(self, number: int, letter: Letter) -> Letter | NoAnswer:
            if letter.kind == "train" and letter.facts["round"] == 1:
                self.by_number[103] = late
            return super().answer(number, letter)

    *early, late = nodes()
    post = Late(early)
    in_a_fleet(f"{EVERYBODY} --num_rounds 6", post=post, terms=Terms(patience=3))
    assert 1 <= left_out()["no node"] <= 3


@pytest.mark.parametrize(
    "words",
    ["--one_shot --merge_alpha 0.5 --head random", pytest.param(f"{EVERYBODY} --num_rounds 1", marks=pytest.mark.slow)],
)
def test_a_client_that_comes_while_the_server_validates_waits_for_a_round(words, monkeypatch):
    class Slow(LocalPost):
        validated = False

        def collect(self, tickets):
            slow = {t for t, (node, letter) in self._sent.items() if node == 100 and "still" in letter.arrays}
            return super().collect([t for t in tickets if self.validated or t not in slow])

    post, original = Slow(nodes()), rounds.evaluate_split

    def evaluate(*known):
        post.validated = True
        return original(*known)

    for module in (rounds, one_shot):
        monkeypatch.setattr(module, "evaluate_split", evaluate)
    in_a_fleet(words, post=post, terms=Terms(patience=0.5))
    assert left_out() == {"no node": 1}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"client": 9}, "client 9"),
        ({"client": 0}, "which another node is"),
        ({"version": "0.0.1"}, "install one version"),
        ({"client": "zero"}, "expected client"),
    ],
)
def test_a_node_that_does_not_belong_is_left_out(wrong, why, capsys):
    class Strange(LocalPost):
        def answer(self, number: int, letter: Letter) -> Letter | NoAnswer:
            answer = super().answer(number, letter)
            strange = number == 103 and answer.kind == "hello"
            return replace(answer, facts=answer.facts | wrong) if strange else answer

    config = parse(federated("fleet", EVERYBODY))
    run_rounds(config, Strange(nodes()), Terms(patience=0.5), Console())
    assert why in capsys.readouterr().out
    assert left_out() == {"no node": 3}


def test_a_run_goes_on_from_its_checkpoint_with_other_nodes():
    """As after a server that was killed: the same bytes as without a break."""
    main(federated("alone"))
    with pytest.raises(RuntimeError, match="killed"):
        in_a_fleet(post=Killed(nodes()))
    in_a_fleet("--resume")
    assert_same("alone", "fleet")


class Killed(LocalPost):
    """The server is killed in round 3, or, of a run that has one round, when the head is to be fitted anew."""

    def send(self, letters, deadline):
        trained = any(letter.kind == "update" for letter in self.seen)
        asked = [letter for letter in letters.values() if letter.kind == "head" or letter.facts.get("round") == 3]
        if trained and asked:
            raise RuntimeError("killed")
        return super().send(letters, deadline)


ONE_SHOT = "--one_shot --merge_alpha 0.5 --head random"


@pytest.mark.slow
def test_a_run_of_one_round_goes_on_from_its_vectors():
    """A server that is killed once all have trained: nobody trains again, and the bytes are the same."""
    main(federated("alone", ONE_SHOT))
    with pytest.raises(RuntimeError, match="killed"):
        in_a_fleet(ONE_SHOT, post=Killed(nodes()))
    post = in_a_fleet(f"{ONE_SHOT} --resume")
    assert not [letter for letter in post.seen if letter.kind == "update"]
    assert_same("alone", "fleet")


@pytest.mark.slow
def test_one_round_goes_on_without_a_node_that_is_killed_in_it():
    """It is as a client that drops out: its vector is nothing, and the head is of those that are there."""

    class Gone(LocalPost):
        def nodes(self) -> set[int]:
            return super().nodes() - ({101} if any(letter.kind == "update" for letter in self.seen) else set())

        def answer(self, number: int, letter: Letter) -> Letter | NoAnswer:
            gone = number == 101 and letter.kind != "hello" and any(seen.kind == "update" for seen in self.seen)
            return NoAnswer("stopped") if gone else super().answer(number, letter)

    in_a_fleet(ONE_SHOT, post=Gone(nodes()))
    assert left_out() == {"no answer": 1}
    assert not load_vector(Path("vectors/fleet.client1.safetensors")).values.any()
    assert load_vector(Path("vectors/fleet.client2.safetensors")).values.any()
    in_a_fleet(f"{ONE_SHOT} --run_name other --merge regmean", post=Gone(nodes()))  # whose moments are not asked for


@pytest.mark.slow
def test_a_rule_that_asks_clients_ends_where_one_left_after_it_had_trained():
    class Leaves(LocalPost):
        def answer(self, number: int, letter: Letter) -> Letter | NoAnswer:
            return NoAnswer("stopped") if (number, letter.kind) == (101, "weigh") else super().answer(number, letter)

    with pytest.raises(InputError, match="client 1 sent no weights, and all that trained are to"):
        in_a_fleet(f"{ONE_SHOT} --merge regmean", post=Leaves(nodes()))


@pytest.mark.slow
def test_a_mean_by_images_is_of_all_whose_vectors_are_in_it():
    mean = f"{ONE_SHOT} --merge mean"
    with pytest.raises(RuntimeError, match="killed"):
        in_a_fleet(mean, post=Killed(nodes()))
    with pytest.raises(InputError, match="client 3, which is not there"):
        in_a_fleet(f"{mean} --resume", post=LocalPost(nodes(3)), terms=Terms(patience=0.5))
