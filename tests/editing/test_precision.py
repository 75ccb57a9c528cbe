"""Scores in strict float32: whatever the processor likes, and whatever is switched on around them."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fedtalos.app.config import settle as settling
from fedtalos.app.config.schema import CentralizedConfig, EditingConfig, RunOptions
from fedtalos.data.images import LabelledImages
from fedtalos.devices import autocast, same_numbers_on_cuda, strict_float32
from fedtalos.notes import noted
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.fisher import fisher_scores
from fedtalos.training.editing.talos import talos_mask
from fedtalos.training.engine.capture import compiled

new_switches = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9")


def switches():
    """How products and convolutions of float32 tensors are computed now."""
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.fixture(autouse=True)
def as_before():
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def test_cublas_has_a_workspace_that_torch_takes_for_deterministic():
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


@new_switches
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_strict_float32_turns_everything_off_and_leaves_it_as_it_was(precision, convolutions):
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions
    before = switches()
    with strict_float32(), strict_float32():
        assert switches() == ("ieee",) * 3
    with pytest.raises(ValueError, match="within"), strict_float32():
        raise ValueError("within")
    assert switches() == before
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 == convolutions


@pytest.mark.parametrize(("strict", "mode"), [(True, 2), (False, 1)])
def test_one_order_is_asked_for_without_inductor_until_something_is_compiled(strict, mode, monkeypatch):
    told, limits = [], SimpleNamespace(cache_size_limit=8)
    monkeypatch.setattr(torch, "_dynamo", SimpleNamespace(config=limits), raising=False)  # the real one takes seconds
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _, warn_only: told.append(warn_only))
    same_numbers_on_cuda(strict=strict)
    assert torch.get_deterministic_debug_mode() == mode
    assert told == []
    compiled(torch.sin)
    assert told == [not strict]
    torch.set_deterministic_debug_mode(0)
    compiled(torch.sin)
    assert len(told) == 1


@new_switches
def test_torchs_two_names_for_products_agree_inside():
    torch.set_float32_matmul_precision("high")
    with strict_float32():
        assert not torch.backends.cuda.matmul.allow_tf32  # RuntimeError where they differ, as of products on CUDA
    assert torch.backends.cuda.matmul.allow_tf32


@new_switches
def test_what_was_chosen_by_torchs_newer_names_is_there_again():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with strict_float32():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.cuda.matmul.fp32_precision = before


@new_switches
@pytest.mark.parametrize(("precision", "inside"), [("fp32", "ieee"), ("bf16", "tf32")])
def test_scores_are_strict_unless_bf16_is_named(precision, inside, vit, images, labels):
    torch.set_float32_matmul_precision("high")
    found = []

    def batches():
        found.append((switches()[0], torch.is_autocast_enabled(labels.device.type)))
        yield images, labels, torch.zeros(12, 1)

    with autocast(labels.device, "bf16"):
        fisher_scores(vit, batches(), eligible_entries(vit).masks, precision=precision)
    assert found == [(inside, False)]
    assert switches()[0] == "tf32"


@pytest.mark.parametrize("mode", ["true", "exact", "batch"])
def test_scores_are_the_same_bits_under_autocast(mode, vit, images, labels):
    score = partial(fisher_scores, vit, [(images, labels, torch.full((12, 1), 0.5))], eligible_entries(vit).masks)
    plain = score(mode=mode)
    with autocast(labels.device, "bf16"):
        surrounded = score(mode=mode)
    assert all(torch.equal(plain[name], surrounded[name]) for name in plain)


def test_a_notebooks_mask_is_the_same_under_autocast(vit, labels):
    vit.head_source = "ridge"
    pixels = torch.randint(0, 256, (12, 3, 8, 8), generator=torch_generator(0, "pixels"), dtype=torch.uint8)
    held = LabelledImages(pixels.to(labels.device), labels)
    plain = talos_mask(vit, held, density=0.2, iterations=2)
    with autocast(labels.device, "bf16"):
        surrounded = talos_mask(vit, held, density=0.2, iterations=2)
    assert all(torch.equal(plain[name], surrounded[name]) for name in plain)
    named = talos_mask(vit, held, density=0.2, iterations=2, precision="bf16")
    assert any(not torch.equal(plain[name], named[name]) for name in plain)


@pytest.mark.parametrize(
    ("config", "asked", "settled"),
    [(EditingConfig, "auto", "fp32"), (EditingConfig, "bf16", "bf16"), (CentralizedConfig, "auto", "bf16")],
)
def test_editing_takes_bf16_only_by_name(config, asked, settled, monkeypatch):
    monkeypatch.setattr(settling, "choose_precision", lambda name, device: "fp32" if name == "fp32" else "bf16")
    noted()
    run = settling.settle(config(run=RunOptions(precision=asked)), None, torch.device("cuda")).run
    assert run.precision == settled
    assert ("strict float32" in noted().get("precision", "")) == (config is EditingConfig and asked == "auto")
