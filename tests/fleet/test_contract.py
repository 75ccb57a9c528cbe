"""A fleet gives the bytes of a simulation: same masks, sums, states and records."""

import csv
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from local_post import LocalPost
from rich.console import Console

from fedtalos.app.config.fleet import FleetNodeConfig
from fedtalos.app.config.schema import EditingConfig, FederatedConfig
from fedtalos.app.run import books
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.cli import main, parse
from fedtalos.errors import InputError
from fedtalos.fleet import editing
from fedtalos.fleet.gathering import Terms
from fedtalos.fleet.node import Node
from fedtalos.fleet.rounds import run_rounds
from fedtalos.training.editing.vector_file import load_vector

FEDERATED = shlex.split(
    "federated --dataset digits --model_size micro --image_size 8 --patch_size 4 --eval_limit 40 --eval_batch_size 16 "
    "--weights none --train_limit 300 --num_clients 4 --local_steps 2 --batch_size 16 --eval_every 2 --threads 1 "
    "--device cpu --precision fp32"
)
MASK = shlex.split(
    "editing --dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --head random "
    "--criterion random --device cpu --run_name m"
)

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


def nodes(count: int = 4, **options: object) -> list[Node]:
    return [
        Node(
            FleetNodeConfig(
                folder=Path(), client=client, dataset="digits", holds="part", device="cpu", threads=1, **options
            ),
            Path("state", str(client)),
        )
        for client in range(count)
    ]


def federated(name: str, words: str = "") -> list[str]:
    """The command of a run: of three rounds, each of half of the clients, where it is not of one."""
    rounds = "" if "--one_shot" in words else "--client_fraction 0.5 --num_rounds 3"
    return [*FEDERATED, "--run_name", name, *shlex.split(f"{rounds} {words}")]


def in_a_fleet(words: str = "", terms: Terms | None = None, post: LocalPost | None = None) -> LocalPost:
    config = parse(federated("fleet", words))
    assert isinstance(config, FederatedConfig)
    post = post or LocalPost(nodes())
    run_rounds(config, post, terms or Terms(patience=60), Console(quiet=True))
    return post


def rows(run: str) -> list[list[str]]:
    """Rows of a run but for its bytes and seconds: a fleet counts what is really sent."""
    with Path("results", run, "metrics.csv").open() as lines:
        return [row[:-3] for row in csv.reader(lines)]


def assert_same(first: str, second: str) -> None:
    assert rows(first) == rows(second)
    tensors = [load_checkpoint(Path("checkpoints", run, "last.json")).tensors for run in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--mask masks/m.safetensors",
        "--algorithm fedprox --mask masks/m.safetensors --freeze_head",
        "--algorithm scaffold --optimizer sgd --mask masks/m.safetensors",
        "--algorithm scaffold --optimizer sgd --dropout_rate 0.3",
        "--head ridge --trainable blocks --freeze_head --client_evaluation --save_vector",
        pytest.param("--head ncm --client_evaluation", marks=pytest.mark.slow),
        "--algorithm fedadam --trainable blocks --partition dirichlet --client_fraction 1",
    ],
)
def test_a_fleet_gives_the_bytes_of_a_simulation(options):
    if "--mask" in options:
        main(MASK)
    main(federated("alone", options))
    in_a_fleet(options)
    assert_same("alone", "fleet")
    if "--client_evaluation" in options:
        by_client = [Path("results", run, "client_accuracy.csv").read_text() for run in ("alone", "fleet")]
        assert by_client[0] == by_client[1]


ONE_SHOT = "--one_shot --merge_alpha 0.5"


@pytest.mark.parametrize(
    "options",
    [
        "--client_evaluation",
        "--merge fisher --mask masks/m.safetensors --algorithm scaffold --optimizer sgd --leave_out 2",
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                "--merge mean --mask masks/m.safetensors --head random --dropout_rate 0.4",
                "--merge regmean --head ncm --no_refit_head --trainable blocks",
                "--merge ties --algorithm fedprox --partition dirichlet --merge_alpha auto",
            )
        ),
    ],
)
def test_one_round_of_a_fleet_gives_the_bytes_of_a_simulation(options):
    if "--mask" in options:
        main(MASK)
    main(federated("alone", f"{ONE_SHOT} {options}"))
    post = in_a_fleet(f"{ONE_SHOT} {options}")
    assert_same("alone", "fleet")
    vectors = {run: sorted(Path("vectors").glob(f"{run}.*")) for run in ("alone", "fleet")}
    assert len(vectors["fleet"]) == len(vectors["alone"]) >= 3
    for alone, fleet in zip(*vectors.values(), strict=True):
        assert load_vector(alone).values.equal(load_vector(fleet).values)
        assert load_vector(alone).facts.task == load_vector(fleet).facts.task
    for file in ("client_accuracy.csv",) if "--client_evaluation" in options else ():
        assert Path("results/alone", file).read_text() == Path("results/fleet", file).read_text()
    summaries = [yaml.safe_load(Path("results", run, "summary.yaml").read_text()) for run in ("alone", "fleet")]
    for said in summaries:
        del said["seconds"], said["evaluation_share"], said["megabytes_sent"]
    assert summaries[0] == summaries[1]
    kinds = {letter.kind for letter in post.seen}
    assert ("weights" in kinds) == ("fisher" in options or "regmean" in options)


EDITING = [
    *shlex.split("editing --calibration federated --dataset digits --model_size micro --image_size 8 --patch_size 4"),
    *shlex.split("--weights none --train_limit 300 --num_clients 4 --eval_limit 40 --calibration_images 60"),
    *shlex.split("--num_iterations 2 --threads 1 --device cpu --precision fp32"),
]


def mask_in_a_fleet(options: str, post: LocalPost) -> LocalPost:
    config = parse([*EDITING, "--run_name", "fleet", *options.split()])
    assert isinstance(config, EditingConfig)
    editing.run(config, post, Terms(patience=60), Console(quiet=True))
    return post


@pytest.mark.parametrize(
    "options", ["--head ridge", "--head ncm --criterion most_sensitive --granularity row --calibration_clients 3"]
)
def test_a_mask_of_a_fleet_has_the_bytes_of_a_simulation(options, monkeypatch):
    main([*EDITING, "--run_name", "alone", *options.split()])
    saved = []
    monkeypatch.setattr(books, "save_checkpoint", lambda *args: saved.append(args[2]) or save_checkpoint(*args))
    post = mask_in_a_fleet(options, LocalPost(nodes()))
    for file in ("{}.safetensors", "{}.head.safetensors"):
        alone, fleet = (Path("masks", file.format(run)).read_bytes() for run in ("alone", "fleet"))
        assert alone == fleet
    scores = [letter for letter in post.seen if letter.kind == "scores"]
    assert scores
    assert all(set(letter.arrays) == {"scores"} and not letter.facts for letter in scores)
    assert saved == list(range(1, len(saved) + 1))  # once each: a kill between two would lose the bytes
    counted = sum(letter.nbytes for letter in post.seen)
    assert int(Path("results/fleet/iterations.csv").read_text().splitlines()[-1].split(",")[4]) == counted


def test_a_mask_is_of_all_who_were_to_score():
    with pytest.raises(InputError, match="client 0 sent no scores"):
        mask_in_a_fleet("--head ncm", LocalPost(nodes(admit=("head",))))
    mask_in_a_fleet("--head ncm --num_iterations 2 --resume", LocalPost(nodes()))
    assert Path("masks/fleet.safetensors").exists()
