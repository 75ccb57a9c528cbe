import csv
import shlex
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from fedtalos.app.load import load
from fedtalos.app.moving import moving_parameters
from fedtalos.checkpoint import load_checkpoint
from fedtalos.cli import main, parse
from fedtalos.experiments import federated
from fedtalos.models.heads import (
    PENALTIES,
    SCALES,
    best_head,
    best_scale,
    head_sums,
    nearest_mean_head,
    read_head,
    ridge_head,
)
from fedtalos.notes import noted
from fedtalos.randomness import generator
from fedtalos.training import local_training
from fedtalos.training.feature_cache import FeatureCache, FeatureStore

KINDS = ("ridge", "ncm")
DIGITS = shlex.split(
    "--dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --train_limit 300 "
    "--eval_limit 100 --device cpu --precision fp32"
)
TRAINING = [*DIGITS, *shlex.split("--batch_size 16 --eval_every 1")]
FEDERATED = ["federated", *TRAINING]
FEDERATED += shlex.split("--num_clients 6 --client_fraction 0.5 --num_rounds 1 --local_steps 2")
CENTRALIZED = ["centralized", *TRAINING, "--num_epochs", "1"]
LINEAR = shlex.split("--head linear --head_rounds 8 --head_learning_rate 0.1")


@pytest.fixture
def folder(in_a_folder_of_its_own, without_figures):
    return in_a_folder_of_its_own


def data(count=200, width=12, classes=5):
    rng = generator(0, "ridge")
    labels = torch.from_numpy(rng.integers(0, classes, count))
    centres = torch.from_numpy(rng.normal(size=(classes, width))).float()
    return centres[labels] + torch.from_numpy(rng.normal(size=(count, width))).float(), labels


def tensors(run: str, name: str = "best") -> dict[str, torch.Tensor]:
    return load_checkpoint(Path("checkpoints", run, f"{name}.json")).tensors


def rows(run: str) -> list[dict[str, str]]:
    with Path("results", run, "metrics.csv").open() as lines:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(lines)]


def summary(run: str):
    return yaml.safe_load(Path("results", run, "summary.yaml").read_text())


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# --- closed form ---


def test_ridge_equals_scikit_learn():
    features, labels = data()
    weight, bias = ridge_head(head_sums("ridge", features, labels, 5), penalty=0.1)
    variance = features.double().var(0, correction=0).mean().item()
    reference = Ridge(alpha=0.1 * len(features) * variance).fit(features.numpy(), F.one_hot(labels, 5).numpy())
    np.testing.assert_allclose(weight.numpy(), reference.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "shift"), [(1e-4, 0.0), (1e4, 0.0), (1.0, 30.0), (100.0, -2000.0)])
def test_answers_do_not_depend_on_the_features_size_and_offset(kind, size, shift):
    features, labels = data()

    def logits(features):
        sums = head_sums(kind, features[:120], labels[:120], 5)
        return F.linear(features.double(), *(part.double() for part in best_head(kind, sums, features, labels)))

    torch.testing.assert_close(logits(features * size + shift), logits(features), rtol=1e-2, atol=1e-2)


def test_a_penalty_at_either_end_of_those_tried_is_noted():
    features, labels = data()
    shuffled = labels[torch.from_numpy(generator(0, "shuffle").permutation(len(labels)))]
    noted()
    for truth, count, penalties, end in (
        (labels, 20, PENALTIES, None),
        (labels, 150, PENALTIES, "; that is the smallest tried, where the loss is level"),
        (shuffled, 150, PENALTIES, "; that is the largest tried, where the loss is level"),
        (labels, 20, (1e-4, 1e-3, 1e-2), "; that is the largest tried, a better one may lie beyond"),
        (labels, 20, (3.0, 10.0, 30.0), "; that is the smallest tried, a better one may lie beyond"),
        (labels, 20, (3.0,), None),
    ):
        sums = head_sums("ridge", features[:count], truth[:count], 5)
        best_head("ridge", sums, features[150:], truth[150:], penalties)
        sentence = noted()["ridge penalty"]
        assert sentence.endswith(end or "by the loss on 50 held-out images")
    best_head("ncm", sums, features[150:], labels[150:])
    assert "ridge penalty" not in noted()


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_features_that_are_all_alike_give_a_finite_head(value):
    features, labels = torch.full((20, 12), value), torch.arange(20) % 5
    weight, bias = best_head("ridge", head_sums("ridge", features, labels, 5), features, labels)
    assert bool(weight.isfinite().all() and bias.isfinite().all())
    torch.testing.assert_close(F.linear(features, weight, bias).softmax(1), torch.full((20, 5), 0.2))


@pytest.mark.parametrize("shift", [0, 100])  # of all features, as far as a backbone's may lie from zero
def test_nearest_means_equal_scikit_learn(shift):
    features, labels = data()
    features = features + shift
    new = torch.from_numpy(generator(1, "new").normal(size=(500, 12)) * 2).float() + shift
    weight, bias = nearest_mean_head(head_sums("ncm", features, labels, 5))
    reference = NearestCentroid().fit(features.numpy(), labels.numpy())
    assert np.array_equal(F.linear(new, weight, bias).argmax(1).numpy(), reference.predict(new.numpy()))
    means = torch.stack([features[labels == label].mean(0) for label in range(5)])
    halves = -torch.cdist(new.double(), means.double()).square() / 2
    expected = halves - halves.mean(1, keepdim=True)
    torch.testing.assert_close(F.linear(new, weight, bias).double(), expected, rtol=1e-4, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=200, max_size=200))
def test_sums_give_the_pooled_head_whatever_the_split(owner):
    features, labels = data()
    owners = torch.tensor(owner)
    parts = [owners == client for client in range(5)]
    for kind in KINDS:
        pooled = head_sums(kind, features, labels, 5)
        summed = reduce(add, [head_sums(kind, features[mine], labels[mine], 5) for mine in parts])
        for ours, expected in zip(
            best_head(kind, summed, features, labels), best_head(kind, pooled, features, labels), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_bytes_are_those_of_the_sums():
    features, labels = data()
    assert head_sums("ridge", features, labels, 5).wire_bytes == 8 * (13 * 14 // 2 + 13 * 5)
    assert head_sums("ncm", features, labels, 5).wire_bytes == 8 * (12 * 5 + 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [[0], [1, 4], [0, 1, 2, 4]])
def test_a_class_without_images_is_finite_and_never_chosen(kind, missing):
    features, labels = data()
    there = ~torch.isin(labels, torch.tensor(missing))
    sums = head_sums(kind, features[there], labels[there], 5)
    weight, bias = best_head(kind, sums, features[there], labels[there])
    new = torch.from_numpy(generator(1, "new").normal(size=(2000, 12)) * 20).float()
    outputs = F.linear(new, weight, bias)
    assert bool(outputs.isfinite().all())
    assert not bool(torch.isin(outputs.argmax(1), torch.tensor(missing)).any())


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_images_of_classes_that_nobody_has_choose_nothing(kind):
    """No head knows them: with them in the loss the others' answers would have to be unsure."""
    features, labels = data()
    there = labels < 3
    sums = head_sums(kind, features[:100][there[:100]], labels[:100][there[:100]], 5)
    every, known = (best_head(kind, sums, features[100:][kept], labels[100:][kept]) for kept in (..., there[100:]))
    assert all(torch.equal(one, other) for one, other in zip(every, known, strict=True))
    strangers = best_head(kind, sums, features[100:][~there[100:]], labels[100:][~there[100:]])
    assert all(bool(tensor.isfinite().all()) for tensor in strangers)


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_lowers_the_loss_and_keeps_the_answers(kind):
    features, labels = data()
    sums, held_out = head_sums(kind, features[:100], labels[:100], 5), (features[100:], labels[100:])
    weight, bias = best_head(kind, sums, *held_out, penalties=(0.1,))
    plain = F.linear(held_out[0], *(ridge_head(sums, 0.1) if kind == "ridge" else nearest_mean_head(sums)))
    scaled = F.linear(held_out[0], weight, bias)
    assert torch.equal(plain.argmax(1), scaled.argmax(1))
    assert F.cross_entropy(scaled, held_out[1]) < F.cross_entropy(plain, held_out[1])


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 9))
def test_the_best_scale_is_the_best_of_all(size, seed):
    outputs = torch.from_numpy(generator(seed, "outputs").normal(size=(50, 4))).float() * 10**size
    labels = (outputs + 10**size * torch.from_numpy(generator(seed, "noise").normal(size=(50, 4)))).argmax(1)
    losses = [F.cross_entropy(outputs * scale, labels).item() for scale in SCALES]
    loss, scale = best_scale(outputs, labels)
    assert loss == losses[SCALES.index(scale)]
    assert loss <= min(losses) + 1e-6


# --- of runs ---


def features_of(loaded, split):
    """Features and labels of a split, val as far as ``eval_limit`` goes."""
    images = loaded.limited("val") if split == "val" else getattr(loaded.data, split)
    return loaded.features.features(loaded.model, images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", [CENTRALIZED, FEDERATED])
def test_the_head_of_a_run_is_the_pooled_one_and_looks_at_no_test_image(kind, command, folder, monkeypatch):
    looked_at = []
    original = FeatureStore.features
    with monkeypatch.context() as patched:
        patched.setattr(
            FeatureStore, "features", lambda self, *given: looked_at.append(given[1]) or original(self, *given)
        )
        main([*command, "--head", kind, "--freeze_head", "--run_name", "a"])
    loaded = load(parse([*command, "--head", kind]))
    splits = {"train": loaded.data.train, "val": loaded.limited("val"), "test": loaded.data.test}
    named = [next(name for name, split in splits.items() if len(split) == len(images)) for images in looked_at]
    assert set(named) == {"train", "val"}
    assert all(torch.equal(images.pixels, splits[name].pixels) for name, images in zip(named, looked_at, strict=True))
    sums = head_sums(kind, *features_of(loaded, "train"), 10)
    weight, bias = best_head(kind, sums, *features_of(loaded, "val"))
    torch.testing.assert_close(tensors("a", "last")["head.weight"], weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tensors("a", "last")["head.bias"], bias, rtol=1e-5, atol=1e-5)
    sent = 6 * sums.wire_bytes if command is FEDERATED else 0
    assert int(rows("a")[0]["bytes_up"]) == sent
    assert yaml.safe_load(Path("results/a/config.yaml").read_text())["head"] == kind


@pytest.mark.parametrize("head", [["--head", "ridge"], ["--head", "ncm"], LINEAR])
def test_every_head_beats_chance_and_trains_on_or_stays(head, folder):
    main([*FEDERATED, *head, "--run_name", "on"])
    main([*FEDERATED, *head, "--freeze_head", "--run_name", "frozen"])
    assert float(rows("on")[0]["accuracy"]) > 0.3  # of 10 classes, on random features
    for key in ("loss", "accuracy", "bytes_up"):
        assert rows("on")[0][key] == rows("frozen")[0][key]
    main([*FEDERATED, *head, "--learning_rate", "1e-30", "--run_name", "start"])
    start = tensors("start", "last")["head.weight"]
    torch.testing.assert_close(tensors("frozen", "last")["head.weight"], start, rtol=0, atol=1e-20)
    assert not torch.equal(tensors("on", "last")["head.weight"], start)


@pytest.mark.parametrize("kind", KINDS)
def test_editing_fits_either_and_writes_it(kind, folder):
    command = ["editing", *DIGITS, *shlex.split("--calibration_fraction 0.1 --num_iterations 1")]
    main([*command, "--head", kind, "--run_name", "m"])
    loaded = load(parse([*command, "--head", kind]))
    weight, bias = read_head(Path("masks/m.head.safetensors"), loaded.model)
    sums = head_sums(kind, *features_of(loaded, "calibration"), 10)
    expected = best_head(kind, sums, *features_of(loaded, "val"))
    assert torch.equal(weight, expected[0])
    assert torch.equal(bias, expected[1])
    main([*command, "--head", kind, "--calibration", "federated", "--num_clients", "4", "--run_name", "f"])
    assert Path("masks/f.head.safetensors").exists()


# --- the linear head ---


def test_a_linear_head_of_one_client_is_a_plain_torch_loop(folder):
    one = shlex.split("--num_clients 1 --client_fraction 1 --local_steps 1 --num_rounds 1 --batch_size 300")
    options = shlex.split("--head linear --head_rounds 6 --head_learning_rate 0.03 --freeze_head --clip_norm 0.5")
    main([*FEDERATED, *one, *options, "--run_name", "a"])
    features, labels = features_of(load(parse([*FEDERATED, *one, *options])), "train")
    layer = torch.nn.Linear(features.shape[1], 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    for number in range(6):  # a client starts its optimiser anew in every round
        rate = 0.03 * 0.5 * (1 + np.cos(np.pi * number / 6))
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=0.01)
        loss = F.cross_entropy(layer(features), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(tensors("a", "last")["head.weight"], layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors("a", "last")["head.bias"], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_a_linear_head_counts_what_it_costs(folder):
    main([*FEDERATED, *LINEAR, "--freeze_head", "--run_name", "a"])
    head = 4 * (96 * 10 + 10)
    assert int(rows("a")[0]["bytes_up"]) == int(rows("a")[0]["bytes_down"]) == 8 * 3 * head
    assert summary("a")["images_trained_on"] == (8 + 1) * 3 * 2 * 16


def test_a_linear_head_that_diverges_says_which_rate_to_lower(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*FEDERATED, "--head", "linear", "--head_learning_rate", "1e15"])
    assert stop.value.code == 1
    assert "fitting the linear head, whose rate is --head_learning_rate: round" in capsys.readouterr().err


def test_a_linear_head_leaves_the_backbone_and_the_draws_of_the_run_alone(folder, monkeypatch):
    seeds, original = [], federated.rounds_of_the_head

    def rounds_of_the_head(loaded, clients, head, seed, watch):
        seeds.append(seed)
        return original(loaded, clients, head, seed, watch)

    monkeypatch.setattr(federated, "rounds_of_the_head", rounds_of_the_head)
    main([*FEDERATED, *LINEAR, "--trainable", "head", "--run_name", "a"])
    main([*FEDERATED, "--head", "random", "--trainable", "head", "--run_name", "b"])
    for name, tensor in tensors("b", "last").items():
        if not name.startswith("head."):
            assert torch.equal(tensors("a", "last")[name], tensor)
    main([*FEDERATED, *LINEAR, "--trainable", "head", "--run_name", "c"])
    first, second = seeds  # none for a random head
    assert first == second != parse([*FEDERATED, *LINEAR]).run.seed


def test_a_linear_head_on_kept_features_is_that_on_images(folder, monkeypatch):
    main([*FEDERATED, *LINEAR, "--freeze_head", "--run_name", "kept"])
    monkeypatch.setattr("fedtalos.models.vision_transformer.VisionTransformer.frozen_stages", lambda *_: 0)
    main([*FEDERATED, *LINEAR, "--freeze_head", "--run_name", "plain"])
    torch.testing.assert_close(
        tensors("kept", "last")["head.weight"], tensors("plain", "last")["head.weight"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("command", [CENTRALIZED, [*FEDERATED, "--num_rounds", "3"]])
@pytest.mark.parametrize(
    ("head", "calls"), [(LINEAR, 5), (LINEAR, 26), (["--head", "ncm"], 1), (["--head", "ridge"], 1)]
)
def test_a_run_stopped_at_its_head_or_after_it_resumes_to_the_same_bits(command, head, calls, folder, monkeypatch):
    if command is CENTRALIZED:
        command = [*command, "--num_epochs", "3"]
        calls = {5: 5, 26: 9, 1: 1}[calls]
    main([*command, *head, "--trainable", "head", "--run_name", "whole"])
    original, seen = local_training.train, []

    def train(*args, **kwargs):
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(local_training, "train", train)
        with pytest.raises(SystemExit):
            main([*command, *head, "--trainable", "head", "--run_name", "cut"])
    main([*command, *head, "--trainable", "head", "--run_name", "cut", "--resume"])
    assert rows("whole") == rows("cut")
    same(tensors("whole", "last"), tensors("cut", "last"))
    same(tensors("whole"), tensors("cut"))


def test_workers_start_from_the_head_that_the_leader_fitted(folder):
    alike = [*LINEAR, "--threads", "1", "--freeze_head"]
    main([*FEDERATED, *alike, "--run_name", "one"])
    main([*FEDERATED, *alike, "--workers", "2", "--run_name", "two"])
    assert rows("one") == rows("two")
    same(tensors("one", "last"), tensors("two", "last"))


def test_features_are_computed_once_and_forgotten_when_the_backbone_moves(folder, monkeypatch):
    seen = []
    original = FeatureCache._compute
    monkeypatch.setattr(FeatureCache, "_compute", lambda self, ids: seen.extend(ids.tolist()) or original(self, ids))
    loaded = load(parse([*FEDERATED, *LINEAR]))
    for _ in range(3):
        loaded.features.features(loaded.model, loaded.data.train, np.arange(7))
        loaded.features.features(loaded.model, loaded.data.train, np.arange(20))
    assert sorted(seen) == [0, *range(20)]  # the first once more, for the shape
    loaded.features.keep_only(moving_parameters(loaded).frozen_stages)
    assert not loaded.features._caches
