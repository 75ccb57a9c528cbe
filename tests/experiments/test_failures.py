"""Clients whose training or update is of no use, who drop out or are late: in the rounds, and as a user runs them."""

import csv
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main, parse
from fedtalos.data.images import LabelledImages
from fedtalos.errors import BadUpdateError, InputError, TrainingError
from fedtalos.experiments import federated
from fedtalos.metrics import Metrics
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.federated.aggregation import WeightedMean, median, robust, trimmed_mean
from fedtalos.training.federated.algorithms.fedopt import FedAvgM
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Lost, Update, fedavg, one_by_one
from fedtalos.training.federated.traffic import Traffic
from fedtalos.training.federated.transforms import dropouts, stragglers
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

SIZES = np.array([1, 2, 3, 4])
START = 5.0
SMALL = shlex.split(
    "federated --dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --threads 1 "
    "--device cpu --precision fp32 --train_limit 300 --eval_limit 40 --num_clients 6 --client_fraction 1 "
    "--num_rounds 4 --local_steps 2 --batch_size 8 --eval_every 2"
)


class Federation:
    """One entry moves; client k sends k, or what it fails with."""

    def __init__(self, fails=None, through=(), **options):
        self.model = VisionTransformer(Architecture("micro", 8, 4, 2), torch_generator(0, "test"))
        with torch.no_grad():
            self.model.norm.bias[0] = START
        self.moving = MaskedParameters(self.model, {"norm.bias": torch.arange(96) == 0})
        images = LabelledImages(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.zeros(10, dtype=torch.long))
        self.clients = Clients.of(images, np.repeat(np.arange(4), SIZES), 4)
        self.fails, self.through, self.options, self.asked = fails or {}, list(through), options, []

    def updates(self, number, clients, theta):
        self.asked.append(list(clients))
        for client in clients:
            failure = self.fails.get(client)
            if isinstance(failure, Lost):
                yield client, failure
            else:
                value = torch.full((1,), float(client if failure is None else failure))
                yield client, Update([value], Metrics(1.0, 1, 1))

    def rounds(self, count=1):
        return list(
            fedavg(
                self.moving,
                self.clients,
                local=LocalTraining(),
                rounds=count,
                fraction=1.0,
                through=self.through,
                engine=lambda *_: self.updates,
                **self.options,
            )
        )

    @property
    def value(self):
        return self.model.norm.bias[0].item()


BAD = {
    "training": (Lost("the loss became nan at local step 2, learning rate 0.1", sent=True), "the loss became nan"),
    "nan": (float("nan"), "the update is not finite"),
    "infinity": (float("-inf"), "the update is not finite"),
}


def late(which):
    """A transform that loses the clients that ``which`` (round, client) names."""

    def transform(updates):
        def present(number, clients, theta):
            answers = updates(number, [client for client in clients if not which(number, client)], theta)
            for client in clients:
                yield (client, Lost("late")) if which(number, client) else next(answers)

        return present

    return transform


@pytest.mark.parametrize(("failure", "said"), BAD.values(), ids=BAD.keys())
def test_a_bad_client_stops_the_round_which_leaves_theta(failure, said):
    federation = Federation({2: failure})
    with pytest.raises(BadUpdateError, match=f"^round 1, client 2: {said}"):
        federation.rounds()
    assert federation.value == START


@pytest.mark.parametrize(("failure", "said"), BAD.values(), ids=BAD.keys())
def test_skipped_it_leaves_the_mean_of_the_others(failure, said):
    federation = Federation({2: failure}, on_bad_client="skip")
    (result,) = federation.rounds()
    assert federation.value == pytest.approx((0 * 1 + 1 * 2 + 3 * 4) / 7)
    assert list(result.lost) == [2]
    assert result.lost[2].why.startswith(said)
    assert result.lost[2].sent
    assert result.train.examples == 3
    assert Traffic(federation.moving, FedAvg(), 4).count(result) == (4 * 4, 4 * 4)


def test_values_of_another_shape_are_a_bad_update_too():
    federation = Federation(on_bad_client="skip")
    right = federation.updates

    def twice_as_many(*arguments):
        for client, update in right(*arguments):
            yield client, replace(update, values=update.values * 2) if client == 3 else update

    federation.updates = twice_as_many
    (result,) = federation.rounds()
    assert "expected 1 values in 1 tensors, got 2 in 2" in result.lost[3].why
    assert federation.value == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)


def test_absent_clients_are_not_trained_and_send_nothing_but_were_sent_theta():
    federation = Federation(through=[late(lambda number, client: client == number)])
    first, second = federation.rounds(2)
    assert federation.asked == [[0, 2, 3], [0, 1, 3]]
    assert first.lost == {1: Lost("late")}
    assert first.clients == (0, 1, 2, 3)
    traffic = Traffic(federation.moving, FedAvg(), 4, first_contact=100)
    assert traffic.count(first) == (4 * 4 + 400, 3 * 4)
    assert traffic.count(second) == (4 * 4, 3 * 4)
    assert federation.value == pytest.approx((0 * 1 + 1 * 2 + 3 * 4) / 7)


@pytest.mark.parametrize("rule", [None, median])
@pytest.mark.parametrize("why", ["bad", "absent"])
def test_a_round_without_anybody_leaves_theta_and_what_the_server_keeps(why, rule):
    fails = dict.fromkeys(range(4), BAD["training"][0]) if why == "bad" else {}
    through = [] if why == "bad" else [late(lambda *_: True)]
    aggregation = WeightedMean if rule is None else robust(rule, byzantine=0)
    algorithm = FedAvgM(aggregation=aggregation)
    algorithm.state["velocity"] = torch.ones(1)
    federation = Federation(fails, through, on_bad_client="skip", algorithm=algorithm)
    (result,) = federation.rounds()
    assert federation.value == START
    assert algorithm.state["velocity"].item() == 1
    assert result.train.examples == 0
    federation.fails, federation.through = {}, []
    assert len(federation.rounds(2)) == 2
    assert federation.value != START


def test_too_few_for_a_robust_rule_end_the_run_or_skip_the_round():
    """One attacker among four that send is withstood by trimming one at each end, among two it is not."""
    half_are_late = [late(lambda number, client: number == 1 and client < 2)]
    algorithm = FedAvgM(aggregation=robust(trimmed_mean, byzantine=1))
    federation = Federation(through=half_are_late, algorithm=algorithm)
    with pytest.raises(
        TrainingError, match=r"^round 1: trimmed_mean against 1 .* needs over 2 clients .* got 2; on_bad_client skip"
    ):
        federation.rounds()
    assert federation.value == START
    assert not algorithm.state
    skipping = Federation(through=half_are_late, algorithm=algorithm, on_bad_client="skip")
    (first,) = skipping.rounds()
    assert skipping.value == START
    assert not algorithm.state
    assert first.too_few.startswith("round 1: trimmed_mean")
    assert (first.train.examples, first.lost) == (0, dict.fromkeys(range(2), Lost("late")))
    assert Traffic(skipping.moving, FedAvg(), 4).count(first) == (4 * 4, 2 * 4)  # the others did send
    *_, second = Federation(through=half_are_late, algorithm=algorithm, on_bad_client="skip").rounds(2)
    assert second.train.examples == 4
    assert algorithm.state


def federate(name: str, options: str = "") -> dict:
    main([*SMALL, "--run_name", name, *shlex.split(options)])
    return yaml.safe_load(Path("results", name, "summary.yaml").read_text())


def tensors(run: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path("checkpoints", run, "last.json")).tensors


def rows(run: str) -> list[list[str]]:
    with Path("results", run, "metrics.csv").open() as lines:
        return [row[:-1] for row in csv.reader(lines)]


def assert_same(first: str, second: str) -> None:
    theirs = tensors(second)
    assert rows(first) == rows(second)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors(first).items())


def why_lost(transform, number=1):
    """Why each of 200 clients is lost in a round, or None."""

    def everybody_trains(_number, clients, _theta):
        yield from ((client, Update([], Metrics())) for client in clients)

    lost = dict(transform(everybody_trains)(number, range(200), None))
    return [lost[client].why if isinstance(lost[client], Lost) else None for client in range(200)]


def test_drop_outs_are_as_often_as_asked_and_a_function_of_seed_round_and_client():
    drawn = [why_lost(dropouts(0.3, seed=0), number) for number in range(1, 21)]
    assert drawn == [why_lost(dropouts(0.3, seed=0), number) for number in range(1, 21)]
    assert np.mean([why == "dropped out" for row in drawn for why in row]) == pytest.approx(0.3, abs=0.03)
    assert {why for row in drawn for why in row} == {None, "dropped out"}
    assert drawn[0] != drawn[1]
    assert drawn[0] != why_lost(dropouts(0.3, seed=1))


def test_the_slow_are_late_in_every_round():
    slow = stragglers(deadline=4, slowest=4, seed=0, steps_of=lambda _client: 2)
    late = [why == "late" for why in why_lost(slow)]
    assert late == [why == "late" for why in why_lost(slow, number=2)]
    assert np.mean(late) == pytest.approx(0.5, abs=0.1)  # two steps of 4**u, u uniform, last over 4 where u > 1/2


def test_who_holds_no_image_is_lost():
    federation = Federation()
    clients = Clients.of(federation.clients.images, np.repeat([1, 2], 5), 3)
    algorithm = FedAvg()
    updates = one_by_one(federation.moving, clients, LocalTraining(steps=1), 0, algorithm)
    lost, trained = updates(1, [0, 1], federation.moving.copy())
    assert lost == (0, Lost("no images"))
    assert isinstance(trained[1], Update)


@pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")
def test_a_bad_update_stops_the_run_with_the_last_good_checkpoint(capsys):
    before = federate("good", "--num_rounds 2 --schedule constant")
    assert before["rounds"] == 2
    with pytest.raises(SystemExit) as error:
        federate("bad", "--schedule constant --attack nan --attackers 6")
    assert error.value.code == 1
    said = capsys.readouterr().err
    assert "round 1, client 0: the update is not finite" in said
    assert "Traceback" not in said
    with pytest.raises(SystemExit):
        federate("rate", "--schedule constant --learning_rate 1e15 --clip_norm None --optimizer sgd")
    said = " ".join(capsys.readouterr().err.split())
    assert "round 1, client 0: the loss became" in said or "round 1, client 0: the update became" in said
    assert "learning rate 1e+15" in said
    assert all(tensor.isfinite().all() for tensor in tensors("rate").values())


@pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")
def test_bad_updates_are_left_out_and_counted(capsys):
    summary = federate("skipped", "--on_bad_client skip --attack nan --attackers 2")
    assert summary["clients_left_out"] == {"bad update": 8}
    assert capsys.readouterr().out.count("left out: the update is not finite") == 8
    assert all(tensor.isfinite().all() for tensor in tensors("skipped").values())
    everyone = federate("everyone", "--on_bad_client skip --attack nan --attackers 6")
    assert everyone["clients_left_out"] == {"bad update": 24}
    assert everyone["images_trained_on"] == 0
    assert "no client's update counted" in capsys.readouterr().out
    federate("longer", "--on_bad_client skip --attack nan --attackers 6 --num_rounds 6")
    both = tensors("everyone"), tensors("longer")
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())


@pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")
def test_drop_outs_under_a_robust_rule_are_skipped_and_counted(capsys):
    krum = "--aggregation krum --byzantine 1 --dropout_rate 0.4 --num_rounds 3 "
    summary = federate("skipped", krum + "--on_bad_client skip")
    assert summary["clients_left_out"]["too few"] > 0
    assert "krum against 1 attackers needs over 4 clients in a round" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        federate("ended", krum)
    assert "--on_bad_client skip" in capsys.readouterr().err


@pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")
@pytest.mark.parametrize(
    "options",
    [
        "--dropout_rate 0.5",
        "--slowest 4 --deadline 4 --dropout_rate 0.2 --algorithm fedavgm",
        "--dropout_rate 0.5 --algorithm scaffold --optimizer sgd",
        "--dropout_rate 0.5 --algorithm fednova",
        "--dropout_rate 0.5 --clients_at_once 3",
        "--on_bad_client skip --attack nan --attackers 3",
    ],
)
def test_runs_with_failures_repeat_resume_and_are_shared(options, monkeypatch):
    whole = federate("whole", options)
    assert sum(whole["clients_left_out"].values()) > 0
    assert whole["megabytes_sent"]["up"] <= whole["megabytes_sent"]["down"]
    with monkeypatch.context() as patched:
        patched.setattr(federated, "evaluate_split", failing_from(federated.evaluate_split, call=3))
        with pytest.raises(SystemExit) as stop:
            federate("parts", options)
    assert stop.value.code == 130
    main(["federated", "--resume", "--run_name", "parts"])
    assert_same("whole", "parts")
    assert (
        yaml.safe_load(Path("results/parts/summary.yaml").read_text())["clients_left_out"] == whole["clients_left_out"]
    )


def failing_from(evaluate, call):
    """``evaluate``, but that from its ``call``-th time on somebody asks twice to stop."""
    calls = []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= call:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    return failing


@pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")
@pytest.mark.parametrize(
    "options",
    [
        "--dropout_rate 0.4 --algorithm scaffold --optimizer sgd",
        # In the first round who takes several steps diverges, in the second everybody.
        "--on_bad_client skip --learning_rate 1e6 --clip_norm None --num_rounds 2 --optimizer sgd --partition quantity "
        "--local_epochs 1 --local_steps 4 --min_client_size 1 --batch_size 32",
    ],
)
def test_many_workers_equal_one_with_failures(options):
    alone = federate("alone", options)
    shared = federate("shared", f"{options} --workers 2")
    assert alone["clients_left_out"] == shared["clients_left_out"]
    assert alone["images_trained_on"] > 0
    assert_same("alone", "shared")


@pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")
def test_clients_of_one_image_train():
    summary = federate("single", "--train_limit 60 --num_clients 60 --client_fraction 0.1")
    sizes = np.bincount(np.load("results/single/split.npz")["client"])
    assert sizes.max() == 1
    assert summary["images_trained_on"] == 4 * 6 * 2


@pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")
@pytest.mark.parametrize("command", ["federated", "centralized"])
def test_a_batch_too_large_for_the_memory_is_taken_in_parts(command, monkeypatch, capsys):
    options = SMALL if command == "federated" else ["centralized", *SMALL[1 : SMALL.index("--num_clients")]]
    options = [*options, *(["--num_epochs", "2", "--batch_size", "8"] if command == "centralized" else [])]
    plain, room = VisionTransformer.forward, 3

    def forward(self, images, passed=0):
        if torch.is_grad_enabled() and len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return plain(self, images, passed)

    main([*options, "--run_name", "whole"])
    monkeypatch.setattr(VisionTransformer, "forward", forward)
    capsys.readouterr()
    main([*options, "--run_name", "parts"])
    said = " ".join(capsys.readouterr().err.split())
    assert [text.split()[-1] for text in said.split(" images at once do not fit")[:-1]] == ["8", "4"]
    for whole, parts in zip(rows("whole")[1:], rows("parts")[1:], strict=True):
        assert float(parts[2]) == pytest.approx(float(whole[2]), rel=1e-3)
    room = 0
    with pytest.raises(SystemExit) as error:
        main([*options, "--run_name", "none"])
    assert error.value.code == 1
    assert "the device's memory ran out" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dropout_rate 1", "dropout_rate"),
        ("--dropout_rate -0.1", "dropout_rate"),
        ("--slowest 0.5 --deadline 4", "slowest"),
        ("--slowest 2", "--slowest 2: has no effect without --deadline; give --deadline too, or leave it out"),
        ("--deadline 1", "--deadline 1: the fastest client needs --local_steps 2; give that or more"),
        ("--learning_rate 1e16", "learning_rate: expected a number up to 1e15"),
        ("--dropout_rate 0.1 --head linear", "--dropout_rate 0.1: the rounds of --head linear"),
        (
            "--on_bad_client skip --dp_noise 1 --max_update_norm 1",
            "--dp_noise 1: its account is of rounds in which every client counts; leave out --on_bad_client skip",
        ),
    ],
)
def test_bad_options_are_refused_in_words(options, said):
    with pytest.raises(InputError) as error:
        parse([*SMALL, *shlex.split(options)])
    assert said in str(error.value)
