"""Masks whose images stay with clients: equal to pooled images, joined by votes, counted in bytes."""

import csv
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import EditingConfig
from fedtalos.app.load import prepare
from fedtalos.app.run.split_file import read_split, split
from fedtalos.app.scoring import image_holders, scorer
from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main
from fedtalos.experiments import editing
from fedtalos.training.editing.mask_file import load_mask, overlap
from fedtalos.training.editing.talos import eligible_entries, keep_lowest

SCRATCH = "--dataset digits --model_size micro --weights none --image_size 8 --patch_size 4 --eval_limit 40"
FEDERATED = shlex.split(f"editing {SCRATCH} --train_limit 90 --num_iterations 3 --calibration federated")
OPTIONS = {
    "dataset": "digits",
    "model_size": "micro",
    "weights": "none",
    "image_size": 8,
    "patch_size": 4,
    "train_limit": 60,
    "calibration": "federated",
    "head": "ridge",
    "calibration_images": 1000,
    "fisher_chunk": 16,
}

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


def scores_of(**options):
    config, setup = prepare(override(EditingConfig(), OPTIONS | options, "test"))
    eligible = eligible_entries(setup.model)
    holders = image_holders(setup, config, split(setup, config.split, config.run.seed))
    assert sum(len(holder.ids) for holder in holders) == 60
    score = scorer(setup, eligible, None, config, lambda batches, _: batches)
    return score(holders, 1, torch.ones(len(eligible), dtype=torch.bool))


@pytest.mark.parametrize(
    "shared_out",
    [
        {"num_clients": 7},
        {"num_clients": 10, "partition": "label_skew", "classes_per_client": 1},
        {"num_clients": 5, "partition": "dirichlet", "min_client_size": 3},
    ],
)
def test_the_sum_over_clients_is_the_score_of_the_pooled_images(shared_out):
    pooled, summed = scores_of(num_clients=1), scores_of(**shared_out)
    torch.testing.assert_close(summed, pooled, rtol=1e-4, atol=1e-5 * float(pooled.mean()))
    everything = torch.ones(len(pooled), dtype=torch.bool)
    count = len(pooled) // 10
    chosen, expected = (keep_lowest(scores, everything, count, 0, 1) for scores in (summed, pooled))
    threshold = pooled[expected].max()
    only_one = pooled[chosen != expected]  # they differ only where scores tie within rounding
    torch.testing.assert_close(only_one, threshold.expand_as(only_one), rtol=1e-4, atol=0)


def made(name: str, *flags: str):
    main([*FEDERATED, "--run_name", name, *flags])
    return load_mask(Path("masks", f"{name}.safetensors"))


def rows(run: str, file: str) -> list[dict[str, str]]:
    with Path("results", run, file).open() as lines:
        return list(csv.DictReader(lines))


def test_clients_give_the_mask_of_one_that_holds_everything():
    pooled, facts = made("pooled", "--num_clients", "1")
    shared, shared_facts = made("shared", "--num_clients", "6", "--partition", "label_skew")
    assert overlap(pooled, shared) > 0.999
    assert (facts.clients, shared_facts.clients) == (1, 6)
    assert facts.calibration_images == shared_facts.calibration_images == 90
    split = read_split(Path("results/shared"))
    assert len(np.bincount(split.client)) == 6
    assert len(split.client) == len(split.label) == 90
    assert split.classes == tuple("0123456789")


def test_bytes_are_those_of_scores_bits_and_head():
    _, facts = made("a", "--num_clients", "4")
    head, features = 10 * 96 + 10, 97
    candidates, down, sums = facts.eligible, 4 * head * 4, set()
    scores = 0
    for row in rows("a", "iterations.csv"):
        down += 4 * -(-candidates // 8)
        scores += 4 * candidates * 4
        assert int(row["bytes_down"]) == down
        sums.add(int(row["bytes_up"]) - scores)
        candidates = int(row["active"])
    assert len(sums) == 1  # sent once, for the head
    assert sums.pop() > 4 * features * features * 4  # each client's X^T X, at least
    summary = yaml.safe_load(Path("results/a/summary.yaml").read_text())
    assert summary["megabytes_sent"]["up"] == int(row["bytes_up"]) / 1e6


def test_clients_send_a_score_per_group():
    made("rows", "--num_clients", "2", "--granularity", "tensor", "--target_sparsity", "0.5")
    first = rows("rows", "iterations.csv")[0]
    tensors = 6 * (12 + 2 + 1)  # q, k, v of each weight, q and v of each bias count
    assert int(first["bytes_down"]) == 2 * (970 * 4 + -(-tensors // 8))


def test_joined_masks_are_votes_over_personal_ones():
    options = ["--num_clients", "3", "--personal_masks"]
    union, facts = made("u", *options, "--merge", "union")
    intersection, _ = made("i", *options, "--merge", "intersection")
    majority, _ = made("m", *options, "--merge", "majority")
    vote, _ = made("v", *options, "--merge", "vote", "--quorum", "0.5")
    own = [load_mask(path)[0] for path in sorted(Path("masks/u").glob("client_*.safetensors"))]
    assert len(own) == 3
    for name in union:
        votes = sum(mask[name].int() for mask in own)
        assert torch.equal(union[name], votes >= 1)
        assert torch.equal(intersection[name], votes == 3)
        assert torch.equal(majority[name], votes >= 2)
        assert torch.equal(vote[name], votes >= 2)
    assert facts.calibration == "federated, iid, union of masks"
    assert [row["images"] for row in rows("u", "clients.csv")] == ["30"] * 3


@pytest.mark.parametrize("merge", ["scores", "union"])
def test_a_resumed_federated_edit_equals_an_uninterrupted_one(merge, monkeypatch):
    options = ["--num_clients", "3", "--merge", merge]
    made("whole", *options)
    save, seen = editing.Edit._save, []

    def save_once(self, *args):
        save(self, *args)
        seen.append(1)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(editing.Edit, "_save", save_once)
        with pytest.raises(SystemExit):
            made("cut", *options)
    assert load_checkpoint(Path("checkpoints/cut/last.json")).facts["rows"]
    made("cut", "--resume", *options)
    assert Path("masks/whole.safetensors").read_bytes() == Path("masks/cut.safetensors").read_bytes()
    assert rows("whole", "report.csv") == rows("cut", "report.csv")


def test_only_some_clients_may_score():
    _, facts = made("some", "--num_clients", "6", "--calibration_clients", "2", "--calibration_images", "20")
    assert (facts.clients, facts.calibration_images) == (2, 20)
    made("own", "--num_clients", "6", "--calibration_clients", "2", "--merge", "union", "--personal_masks")
    numbers = [row["client"] for row in rows("own", "clients.csv")]
    assert sorted(path.stem for path in Path("masks/own").glob("*")) == [f"client_{int(n):03d}" for n in numbers]
