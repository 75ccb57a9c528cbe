"""Runs of tasks and of one round, and what forgetting takes out of them again."""

import copy
import csv
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import SMALL, interrupt_after, refused
from safetensors.torch import load_file

import fedtalos as ft
from fedtalos.app.config.rounds import rounds_of
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.merging import that_sent
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.runs import read_run
from fedtalos.app.run.trained_apart import read_trained_apart
from fedtalos.checkpoint import HEADER, load_checkpoint, save_checkpoint
from fedtalos.cli import main, parse
from fedtalos.experiments import federated
from fedtalos.models.heads import set_head
from fedtalos.training.editing.vector_facts import head_fingerprint
from fedtalos.training.masked_parameters import MaskedParameters

RUN = [*SMALL, "--num_clients", "4", "--local_steps", "2", "--batch_size", "8", "--threads", "1"]
TASKS = ["federated", *RUN, "--tasks", "2", "--num_rounds", "2", "--client_fraction", "0.5"]
ONE_SHOT = ["federated", *RUN, "--one_shot", "--merge_alpha", "0.5"]

pytestmark = pytest.mark.usefixtures("without_figures")


def run(command: list[str], more: str = "") -> None:
    main([*command, *shlex.split(more)])


def summary(name: str) -> dict:
    return yaml.safe_load(Path("results", name, "summary.yaml").read_text())


def model(name: str) -> dict[str, torch.Tensor]:
    """A run's last model, without what lies beside it."""
    file = next(Path("checkpoints", name).glob("last-*.safetensors"))
    return {name: tensor for name, tensor in load_file(file).items() if "/" not in name}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a run of two tasks, and one of one round; to be read only."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        from fedtalos.app.figures import draw

        patched.setattr(draw, "plot_run", lambda *_: [])
        patched.chdir(folder)
        torch.set_num_threads(1)
        run(TASKS, "--run_name two --merge_alpha 0.5")
        run(ONE_SHOT, "--run_name once --client_evaluation --partition dirichlet --min_client_size 5")
    return folder


@pytest.fixture
def inside(runs, tmp_path, monkeypatch) -> Path:
    """The runs, as links in a folder of the test's own."""
    for kind in ("results", "checkpoints", "vectors"):
        (tmp_path / kind).mkdir()
        for folder in (runs / kind).iterdir():
            (tmp_path / kind / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_runs_vector_has_the_head_that_its_tasks_began_with(inside):
    run(["vector", "make", "two"], "--name made")
    made, task = (ft.load_vector(Path("vectors", f"{name}.safetensors")) for name in ("made", "two.task0"))
    refitted = model("two")
    assert made.facts.head == task.facts.head != head_fingerprint((refitted["head.weight"], refitted["head.bias"]))


def test_the_best_models_vector_has_that_head_too(inside):
    """The best checkpoint holds the model alone, whose head was fitted anew."""
    last = load_checkpoint(Path("checkpoints/two/last.json"))
    Path("checkpoints/two").unlink()
    facts = {name: fact for name, fact in last.facts.items() if name not in HEADER}
    save_checkpoint(Path("checkpoints/two"), "last", 4, last.tensors, facts)
    save_checkpoint(Path("checkpoints/two"), "best", 4, {n: t for n, t in last.tensors.items() if "/" not in n}, facts)
    run(["vector", "make", "two", "--which", "best"], "--name best")
    made, task = (ft.load_vector(Path("vectors", f"{name}.safetensors")) for name in ("best", "two.task0"))
    assert made.facts.head == task.facts.head


def test_who_is_left_out_has_no_part_in_a_linear_head(in_a_folder_of_its_own, monkeypatch):
    seen, original = set(), federated.rounds_of_the_head

    def rounds_of_the_head(loaded, clients, head, seed, watch):
        seen.update(clients.images.labels[clients.ids].tolist())
        return original(loaded, clients, head, seed, watch)

    monkeypatch.setattr(federated, "rounds_of_the_head", rounds_of_the_head)
    run(TASKS, "--num_rounds 1 --head linear --head_rounds 1 --merge_alpha 0.5 --leave_out 0 --run_name fewer")
    assert seen == {5, 6, 7, 8, 9}


def test_a_head_that_moves_is_left_out_with_the_vectors(in_a_folder_of_its_own, capsys):
    run(ONE_SHOT, "--head random --no_refit_head --run_name moves")
    run(["forget", "moves", "--client", "2", "--alpha", "0", "--device", "cpu"])
    assert "head: moves, so it is as the vectors leave it" in capsys.readouterr().out
    start = load_checkpoint(Path("checkpoints/moves/last.json")).tensors["apart/head.weight"]
    others = [ft.load_vector(Path(f"vectors/moves.client{k}.safetensors")).tensors()["head.weight"] for k in (0, 1, 3)]
    torch.testing.assert_close(model("moves-without-client2")["head.weight"], start + 0.5 * sum(others))


@pytest.mark.parametrize(("command", "name"), [(TASKS, "two"), (ONE_SHOT, "once")])
def test_the_rounds_that_options_say_are_those_that_a_run_has(inside, command, name):
    config = parse(command)
    assert isinstance(config, FederatedConfig)
    found, run_ = rounds_of(config), read_run(RunPaths(Path(), name))
    assert found.total == summary(name)["rounds"] == run_.done == run_.total
    with Path("results", name, "metrics.csv").open() as file:
        images = [int(row["examples"]) for row in csv.DictReader(file) if row["split"] == "train"]
    assert len(images) == found.total
    assert found.clients == 1
    assert max(images) <= 2 * 8  # one client's two steps of eight


def test_every_task_leaves_its_vector_and_the_table_says_what_came_of_it(inside):
    said = summary("two")
    assert said["merged"] == {"rule": "sum", "alpha": 0.5, "refit": "ridge", "units": ["task0", "task1"]}
    assert said["rounds"] == 4
    assert set(said["task_accuracy"]) >= {"base", "single_known", "merged", "refitted", "normalised"}
    assert sorted(path.name for path in Path("vectors").glob("two.*")) == [
        "two.task0.safetensors",
        "two.task1.safetensors",
    ]
    lines = Path("results/two/tasks.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("task0,5,")


def test_vectors_of_an_earlier_run_are_never_overwritten(inside, capsys):
    Path("results/two").unlink()
    Path("checkpoints/two").unlink()
    assert "exists, of an earlier run" in refused([*TASKS, "--run_name", "two"], capsys)
    assert not Path("results/two").exists()


def test_one_round_has_a_round_a_client_and_counts_vectors_and_sums(inside):
    said = summary("once")
    vector = 4 * said["moving_parameters"]
    width, classes = 96, 10
    sums = 8 * ((width + 1) * (width + 2) // 2 + (width + 1) * classes)
    assert said["rounds"] == 4
    assert said["merged"]["units"] == [f"client{client}" for client in range(4)]
    assert round(1e6 * said["megabytes_sent"]["up"], -3) == round(4 * (vector + 2 * sums), -3)
    assert "own_vector_accuracy" in Path("results/once/client_accuracy.csv").read_text()
    assert 0 <= said["own_vector_test_accuracy"]["mean"] <= 1


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
def test_rules_that_weigh_by_clients_images_are_the_librarys_and_count_what_is_sent(inside, rule):
    """Of a run without tasks every client weighs by its own images, under the model that it trained."""
    run(ONE_SHOT, f"--merge {rule} --run_name weighed --trainable all")
    trained = read_trained_apart("weighed", Path(), {"device": "cpu"})
    train, base, weights = trained.loaded.data.train, copy.deepcopy(trained.loaded.model), []
    set_head(base, *(trained.checkpoint.tensors[f"apart/head.{part}"] for part in ("weight", "bias")))
    MaskedParameters(base, trained.moving.entries.masks).write(trained.start)
    for vector, ids in zip(trained.vectors, trained.clients, strict=True):
        own = ft.apply(base, vector)
        if rule == "regmean":
            weights.append(ft.input_moments(own, train.subset(ids)))
        else:
            layers = {name: mask for name, mask in vector.mask.items() if not name.endswith(("token", "embed"))}
            weights.append(ft.fisher_scores(own, ft.scored_batches(own, train, ids), layers))
    given = {"scores" if rule == "fisher" else "moments": weights}
    expected = trained.start + 0.5 * ft.merge(trained.vectors, rule, **given).values
    torch.testing.assert_close(trained.moving.vector(), expected)

    moving, inputs = trained.moving, sum(t.shape[-1] for n, t in weights[0].items() if n in trained.moving.parameters)
    sums = 8 * (97 * 98 // 2 + 97 * 10)
    scores = sum(scores.numel() for scores in weights[0].values())  # embeddings have none
    sent = 4 * (moving.nbytes + 2 * sums + 4 * (scores if rule == "fisher" else inputs))
    assert summary("weighed")["megabytes_sent"]["up"] == pytest.approx(sent / 1e6, abs=1e-3)

    kept = [number for number in range(4) if number != 1]
    left = ft.merge(
        [trained.vectors[n] for n in kept], rule, **{name: [w[n] for n in kept] for name, w in given.items()}
    )
    torch.testing.assert_close(trained.without([1]), trained.start + 0.5 * left.values)
    torch.testing.assert_close(trained.moving.vector(), expected)  # left as it was


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(inside, monkeypatch, calls):
    """It ends in the middle of a round; those before it were saved, as often as --eval_every says."""
    with monkeypatch.context() as patched:
        interrupt_after(patched, calls)
        with pytest.raises(SystemExit):
            run(TASKS, "--run_name stopped --merge_alpha 0.5 --eval_every 1")
    assert load_checkpoint(Path("checkpoints", "stopped", "last.json")).facts["progress"]["done"] == calls
    run(["federated"], "--resume --run_name stopped")
    whole, found = summary("two"), summary("stopped")
    for figures in (whole, found):
        del figures["seconds"], figures["evaluation_share"]
    assert found == whole
    for name, tensor in model("two").items():
        assert tensor.equal(model("stopped")[name])


def test_a_forgotten_task_is_one_that_never_came(inside, capsys):
    """Left out of the merger, it is as in a run in which it trained as well, but was not merged."""
    run(["forget", "two", "--classes", "0", "1", "2", "3", "4", "--alpha", "0", "--device", "cpu"])
    said = capsys.readouterr().out
    assert [words in said for words in ("body: 1 vector merged", "exact, but for the first head", "probe")] == [
        True
    ] * 3
    assert "alpha, chosen on" not in said  # the run was told it
    found = summary("two-without-task0")
    assert found["accuracy"]["left out"]["target"] == 0  # the head has no sums of these classes
    assert found["forgot"] == "task0"
    vector = load_file("vectors/two.task1.safetensors")["values"]
    start = load_file(next(Path("checkpoints/two").glob("last-*.safetensors")))["apart/start"]
    after = torch.cat([t.flatten() for n, t in model("two-without-task0").items() if not n.startswith("head.")])
    assert len(after) == len(start)
    torch.testing.assert_close(after.sort().values, (start + 0.5 * vector).sort().values)
    run(["evaluate", "two-without-task0"])
    assert "accuracy" in capsys.readouterr().out


def test_a_client_is_forgotten_and_compared_with_retraining(inside, capsys):
    run(ONE_SHOT, "--run_name fewer --partition dirichlet --min_client_size 5 --leave_out 2")
    assert summary("fewer")["merged"]["units"] == ["client0", "client1", "client3"]
    run(["forget", "once", "--client", "2", "--retrained", "fewer", "--keep_head", "--name", "gone"])
    rows = summary("gone")["accuracy"]
    assert set(rows) >= {"before", "retrained", "left out"}
    assert "its own training images" in capsys.readouterr().out
    assert Path("results/gone/forgetting.csv").read_text().startswith("model,target,control,probe,control_share")


def test_it_is_said_who_has_no_say(in_a_folder_of_its_own, capsys):
    run(ONE_SHOT, "--run_name d --dropout_rate 0.5 --device cpu")
    silent = [k for k in range(4) if not ft.load_vector(Path(f"vectors/d.client{k}.safetensors")).values.any()]
    assert 0 < len(silent) < 3
    named = ", ".join(f"client{client}" for client in silent)
    assert f"merge: without {named}: nothing came back" in capsys.readouterr().out
    heard = next(client for client in range(4) if client not in silent)
    run(["forget", "d", "--client", str(heard), "--alpha", "0", "--device", "cpu"])
    assert f"body: {3 - len(silent)} vector" in capsys.readouterr().out


def test_a_client_that_sent_nothing_has_no_say(inside):
    """It dropped out, or came late: its vector of zeros would pull a mean towards the start."""
    trained = read_trained_apart("once", Path(), {"device": "cpu"})
    units, vectors = trained.units, list(trained.vectors)
    nothing = replace(vectors[1], values=torch.zeros(len(vectors[1])))
    assert that_sent(units, vectors)[0] == units
    assert [unit.name for unit in that_sent(units, [vectors[0], nothing, *vectors[2:]])[0]] == [
        "client0",
        "client2",
        "client3",
    ]
    assert that_sent(units, [nothing] * 4)[0] == units


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("two", "expected one of --classes, --task and --client"),
        ("two --task 0 --client 1", "expected one of"),
        ("two --classes 0 1", "task0 is of 0 1 2 3 4"),
        ("two --classes cat", "no such class"),
        ("two --task 2", "it has those of task0, task1"),
        ("two --client 1", "kept no vector of it"),
        ("once --client 9", "kept no vector of it"),
        ("two --classes 0 1 2 3 4 5 6 7 8 9", "nothing would be left"),
        ("nobody --task 0", "there is none"),
        ("../two --task 0", "plain folder name"),
        ("two --task 0 --name two", "exists"),
        ("two --task 0 --retrained nobody", "nobody"),
        ("two --task 0 --alpha nan", "alpha"),
        ("two --task 0 --alpha much", "--alpha: input should be 'auto' or a valid number"),
    ],
)
def test_what_cannot_be_forgotten_is_refused_and_nothing_is_written(inside, capsys, words, says):
    before = {path.name for path in Path("results").iterdir()}
    assert says in refused(["forget", *words.split(), "--device", "cpu"], capsys)
    assert {path.name for path in Path("results").iterdir()} == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--tasks 5", "every task needs a client"),
        ("--tasks 2 --task_order superclass", "superclass"),
        ("--tasks 11 --num_clients 20", "11 groups of 10 classes"),
        ("--merge ties", "nothing is merged without --tasks or --one_shot"),
        ("--leave_out 1", "nothing is merged without"),
        ("--task_order random", "--tasks"),
        ("--one_shot --merge best", "merge"),
        ("--one_shot --leave_out 4", "the clients are 0 to 3"),
        ("--one_shot --leave_out 0 1 2 3", "nobody would be left"),
        ("--one_shot --num_rounds 5", "one of them is used"),
        ("--one_shot --warmup 1", "one of them is used"),
        ("--one_shot --workers 2", "leave it out"),
        ("--one_shot --aggregation median", "leave one of them out"),
        ("--one_shot --merge_alpha inf", "merge_alpha"),
        ("--one_shot --merge_alpha much", "merge_alpha"),
    ],
)
def test_tasks_that_cannot_be_are_refused(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    command = ["federated", *SMALL, "--num_clients", "4", *words.split()]
    if "--num_clients 20" in words:
        command = ["federated", *SMALL, *words.split()]
    assert says in refused(command, capsys)
    assert not Path("checkpoints").exists()
    assert not list(Path().glob("results/*/config.yaml"))


def test_a_run_without_kept_vectors_forgets_nothing(inside, capsys):
    run(["federated", *RUN], "--num_rounds 1 --run_name plain")
    assert "merged no vectors" in refused(["forget", "plain", "--task", "0"], capsys)
