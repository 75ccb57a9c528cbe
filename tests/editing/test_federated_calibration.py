"""Masks by the real command: of images that stay with clients, equal to pooled images, counted in bytes."""

import csv
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import EditingConfig
from fedtalos.app.load import load
from fedtalos.app.run.split_file import read_split
from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main
from fedtalos.experiments import editing
from fedtalos.models.heads import read_head, set_head
from fedtalos.training.editing.combine import overlap
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.editing.ranking import keep_lowest
from fedtalos.training.editing.sensitivity import Holder
from fedtalos.training.editing.talos import talos_mask
from fedtalos.training.federated.partition import split_clients

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
    edit = editing.prepare(load(override(EditingConfig(), OPTIONS | options, "test")))
    assert sum(len(holder.ids) for holder in edit.holders) == 60
    score = editing.score_of(edit, lambda batches, _share: batches)
    return score(1, torch.ones(len(edit.eligible), dtype=torch.bool))


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
    return read_mask_file(Path("masks", f"{name}.safetensors"))


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


def test_a_resumed_federated_edit_equals_an_uninterrupted_one(monkeypatch):
    options = ["--num_clients", "3"]
    made("whole", *options)
    record, seen = editing.Books.record, []

    def record_once(self, *words, **more):
        record(self, *words, **more)
        seen.append(1)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(editing.Books, "record", record_once)
        with pytest.raises(SystemExit):
            made("cut", *options)
    assert load_checkpoint(Path("checkpoints/cut/last.json")).facts["rows"]
    made("cut", "--resume", *options)
    assert Path("masks/whole.safetensors").read_bytes() == Path("masks/cut.safetensors").read_bytes()
    assert rows("whole", "report.csv") == rows("cut", "report.csv")
    plain = [[{**row, "seconds": ""} for row in rows(run, "iterations.csv")] for run in ("whole", "cut")]
    assert plain[0] == plain[1]


def test_only_some_clients_may_score():
    _, facts = made("some", "--num_clients", "6", "--calibration_clients", "2", "--calibration_images", "20")
    assert (facts.clients, facts.calibration_images) == (2, 20)


def test_a_client_may_make_a_mask_of_its_own():
    masks = {}
    for client in ("1", "3"):
        masks[client], facts = made(f"of_{client}", "--num_clients", "6", "--calibration_client", client)
        assert (facts.clients, facts.calibration_images) == (1, 15)
        assert facts.calibration == f"federated, iid, client {client} alone"
        assert {row["bytes_down"] for row in rows(f"of_{client}", "iterations.csv")} == {str(6 * 970 * 4)}  # the head
    assert overlap(masks["1"], masks["3"]) < 0.9
    with pytest.raises(SystemExit):
        made("of_6", "--num_clients", "6", "--calibration_client", "6")


def loaded_with_the_head_of(run: str, **options):
    loaded = load(override(EditingConfig(), OPTIONS | {"train_limit": 90} | options, "test"))
    set_head(loaded.model, *read_head(Path("masks", f"{run}.head.safetensors"), loaded.model))
    return loaded.model, loaded.data


def test_a_notebook_makes_the_commands_masks():
    options = ["--seed", "4", "--calibration_images", "25", "--granularity", "row", "--target_sparsity", "0.8"]
    central, facts = made("central", "--calibration", "central", *options)
    assert (facts.calibration, facts.calibration_images) == ("central", 25)
    shared = {"density": 1 - 0.8, "iterations": 3, "granularity": "row", "seed": 4}
    model, data = loaded_with_the_head_of("central", seed=4)
    found = talos_mask(model, data.calibration, max_images=25, **shared)
    assert all(torch.equal(found[name], central[name]) for name in central)
    federated, _ = made("federated", "--num_clients", "5", *options)
    model, data = loaded_with_the_head_of("federated", seed=4)
    clients = split_clients(data.train, 5, seed=4)
    holders = [Holder(number, ids, data.train) for number, ids in enumerate(clients)]
    found = talos_mask(model, holders, max_images=25, **shared)
    assert all(torch.equal(found[name], federated[name]) for name in federated)
