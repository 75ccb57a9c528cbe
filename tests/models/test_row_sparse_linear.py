import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fedtalos.devices import autocast
from fedtalos.models.row_sparse_linear import Linear, Rows, rows_with_true
from fedtalos.randomness import torch_generator
from fedtalos.training.loop import train
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.sparse_optimizer import make_optimizer


@dataclass
class Case:
    """Two layers of the same weights, an input (..., I), and rows of the weight."""

    plain: nn.Linear
    ours: Linear
    x: Tensor
    rows: list[int]


@st.composite
def cases(draw):
    leading = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    features_in, features_out = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    rows = sorted(draw(st.sets(st.integers(0, features_out - 1), min_size=1)))
    generator = torch_generator(draw(st.integers(0, 99)), "linear")
    ours = Linear(features_in, features_out, bias=draw(st.booleans()))
    for p in ours.parameters():
        nn.init.normal_(p, generator=generator)
    plain = nn.Linear(features_in, features_out, bias=ours.bias is not None)
    plain.load_state_dict(ours.state_dict())
    return Case(plain, ours, torch.randn(*leading, features_in, generator=generator), rows)


def as_given(rows: list[int]) -> Rows:
    """A slice for one range, else numbers."""
    contiguous = rows == list(range(rows[0], rows[-1] + 1))
    return slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows)


def output_and_gradients(layer: nn.Linear, x: Tensor, precision="fp32"):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with autocast(x.device, precision):
        out = layer(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out, x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_equals_nn_linear_but_for_rows_that_may_not_move(case, precision, tolerance):
    expected = output_and_gradients(case.plain, case.x, precision)
    case.ours.active_rows = as_given(case.rows)
    out, of_x, of_weight, of_bias = output_and_gradients(case.ours, case.x, precision)
    assert torch.equal(out, expected[0])
    assert out.dtype == expected[0].dtype
    active = torch.zeros(len(case.ours.weight), dtype=torch.bool)
    active[case.rows] = True
    assert of_weight.dtype == torch.float32
    assert of_weight[~active].count_nonzero() == 0
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(of_weight[active], expected[2][active], **close)
    torch.testing.assert_close(of_x, expected[1], **close)
    torch.testing.assert_close(of_bias, expected[3], **close)


@settings(deadline=None, max_examples=20)
@given(case=cases())
def test_without_rows_it_is_nn_linear_bit_for_bit_before_and_after_rows_were_set(case):
    expected = output_and_gradients(case.plain, case.x)
    for rows in (None, as_given(case.rows), None):
        case.ours.active_rows = rows
        found = output_and_gradients(case.ours, case.x)
        for f, e in zip(found, expected, strict=True):
            assert rows is not None or f is e is None or torch.equal(f, e)


@pytest.mark.parametrize("moves_before", [False, True])
@pytest.mark.parametrize("rows", [slice(2, 6), torch.tensor([0, 3, 7])])
def test_costs_only_the_products_and_the_memory_that_are_needed(rows, moves_before):
    layer, x = Linear(6, 10), torch.randn(4, 5, 6, requires_grad=moves_before)
    layer.active_rows = rows
    saved = []
    with (
        saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t),
        FlopCounterMode(display=False) as c,
    ):
        layer(x).sum().backward()
    active = 4 if isinstance(rows, slice) else 3
    assert c.get_total_flops() == 2 * 20 * 6 * (10 + active + 10 * moves_before)
    assert saved == [x.data_ptr()] + [layer.weight.data_ptr()] * moves_before


def test_a_frozen_weight_keeps_no_input_for_backward():
    layer, x = Linear(6, 10).requires_grad_(False), torch.randn(5, 6, requires_grad=True)
    layer.active_rows = slice(0, 3)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        layer(x).sum().backward()
    assert saved == [layer.weight.data_ptr()]
    assert layer.weight.grad is None


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_rows_with_true_cover_every_true(height, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, height - 1), min_size=1)))
    mask = torch.zeros(height, 3, dtype=torch.bool)
    mask[chosen, data.draw(st.integers(0, 2))] = True
    rows = rows_with_true(mask)
    covered = torch.arange(height)[slice(None) if rows is None else rows].tolist()
    assert set(chosen) <= set(covered)
    assert len(chosen) >= 0.75 * len(covered)
    assert (rows is None) == (len(covered) == height)
    assert isinstance(rows, Tensor) or covered == list(range(covered[0], covered[-1] + 1))


def qk_masks(vit):
    """Scattered entries of q and k in block 1, few rows of fc1 in block 3, a bias."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool, requires_grad=False) for name, p in vit.named_parameters()}
    qk = masks["blocks.1.attn.qkv.weight"][:192]
    qk.copy_(torch.rand(qk.shape, generator=torch_generator(0, "mask")) < 0.1)
    masks["blocks.3.mlp.fc1.weight"][[1, 50, 200]] = True
    masks["blocks.3.attn.proj.bias"][:] = True
    return masks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_masked_step_moves_active_entries_as_without_active_rows(vit, images, labels, precision):
    start = {name: p.detach().clone() for name, p in vit.named_parameters()}
    entries = MaskedParameters(vit, qk_masks(vit)).entries

    def trained(model, *, by_rows):
        moving = MaskedParameters(model, qk_masks(model))
        if not by_rows:
            moving._active_rows.clear()
        optimizer = make_optimizer(moving.parameters, moving.entries, rule="adamw", learning_rate=1.0, weight_decay=0.1)
        batches = [(images, labels)] * 3
        train(moving, batches, optimizer, learning_rate=lambda _: 1e-3, clip_norm=1.0, precision=precision)
        assert (
            any(module.active_rows is not None for module in model.modules() if isinstance(module, Linear)) == by_rows
        )
        return {name: p.detach() for name, p in model.named_parameters()}

    expected, found = trained(copy.deepcopy(vit), by_rows=False), trained(vit, by_rows=True)
    close = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(entries.gather(found), entries.gather(expected), **close)
    assert not torch.equal(entries.gather(found), entries.gather(start))
    for name, mask in qk_masks(vit).items():
        assert torch.equal(found[name][~mask].view(torch.int32), start[name][~mask].view(torch.int32)), name


def test_freezing_anew_sets_rows_anew(vit):
    MaskedParameters(vit, qk_masks(vit))
    rows = {
        name: m.active_rows for name, m in vit.named_modules() if isinstance(m, Linear) and m.active_rows is not None
    }
    assert rows["blocks.1.attn.qkv"] == slice(0, 192)
    assert rows["blocks.3.mlp.fc1"].tolist() == [1, 50, 200]
    assert len(rows) == 2
    MaskedParameters(vit, {"blocks.1.attn.qkv.weight": torch.ones(288, 96, dtype=torch.bool)})
    assert all(module.active_rows is None for module in vit.modules() if isinstance(module, Linear))
