import math

import pytest
import torch
from torch import nn

from fedtalos.errors import BadUpdateError
from fedtalos.training.loop import train
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.sparse_optimizer import SparseAdamW, SparseSGD, make_optimizer


def optimizer_of(moving, rule="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0):
    return make_optimizer(
        moving.parameters,
        moving.entries,
        rule=rule,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
    )


def some_rows(vit):
    """Some rows of a weight, and a whole bias."""
    rows = torch.zeros_like(vit.blocks[2].attn.qkv.weight, dtype=torch.bool)
    rows[5:40:3] = True
    return {"blocks.2.attn.qkv.weight": rows, "head.bias": torch.ones_like(vit.head.bias, dtype=torch.bool)}


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_equals_a_plain_loop(vit, images, labels, rule):
    """In float64, for of gradients that are but rounding AdamW makes steps of its full rate."""
    start = {name: p.detach().clone() for name, p in vit.double().named_parameters()}
    batches = [(images[:6].double(), labels[:6]), (images[6:].double(), labels[6:])]
    if rule == "sgd":
        optimizer = torch.optim.SGD(vit.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(vit.parameters(), lr=0.05, weight_decay=0.01)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(vit(x).float(), y)
        loss.backward()
        nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() * len(y))
    expected = {name: p.detach().clone() for name, p in vit.named_parameters()}

    vit.load_state_dict(start)
    moving = MaskedParameters(vit)
    ours = optimizer_of(moving, rule, momentum=0.9, weight_decay=0.01)
    metrics = train(moving, batches, ours, learning_rate=lambda _: 0.05, clip_norm=1.0)
    assert metrics.examples == 12
    assert metrics.loss_sum == pytest.approx(sum(losses), rel=1e-6)
    for name, p in vit.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_frozen_entries_keep_their_bits_and_moving_ones_do_not(vit, images, labels, rule):
    mask = some_rows(vit)
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    moving = MaskedParameters(vit, mask)
    optimizer = optimizer_of(moving, rule, momentum=0.9, weight_decay=0.1)
    train(moving, [(images, labels)] * 3, optimizer, learning_rate=lambda _: 0.1)
    for name, p in vit.named_parameters():
        chosen = mask.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[~chosen], before[name][~chosen])
        assert not chosen.any() or (p[chosen] != before[name][chosen]).float().mean() > 0.99


def test_gradients_are_adjusted_before_they_are_clipped(vit, images, labels):
    moving = MaskedParameters(vit, some_rows(vit))
    before = moving.vector()
    options = {"learning_rate": lambda _: 1.0, "clip_norm": 0.25, "adjust": lambda gradient: gradient + 100}
    train(moving, [(images, labels)], optimizer_of(moving), **options)
    assert (moving.vector() - before).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_step(vit, images, labels):
    if images.device.type != "cpu":
        pytest.skip("elsewhere it is seen within CHECK_EVERY steps")
    moving = MaskedParameters(vit)
    before = [p.detach().clone() for p in vit.parameters()]
    with pytest.raises(BadUpdateError, match=r"local step 1, learning rate 0\.1"):
        train(moving, [(images * math.inf, labels)], optimizer_of(moving), learning_rate=lambda _: 0.1)
    for p, b in zip(vit.parameters(), before, strict=True):
        assert torch.equal(p, b)


def test_a_last_step_that_leaves_values_that_are_not_finite_is_bad(vit, images, labels):
    moving = MaskedParameters(vit)
    with pytest.raises(BadUpdateError, match=r"the update became not finite at local step 1, learning rate 3e\+38"):
        train(moving, [(images, labels)], optimizer_of(moving), learning_rate=lambda _: 3e38, clip_norm=1.0)


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimiser_of_whole_tensors_is_refused_where_a_mask_freezes_entries_of_them(vit, images, labels, rule):
    moving = MaskedParameters(vit, some_rows(vit))
    before = [p.detach().clone() for p in vit.parameters()]
    optimizer = rule(moving.parameters.values(), lr=0.1)
    with pytest.raises(ValueError, match=f"optimizer: {rule.__name__} steps whole tensors, .* take SparseSGD"):
        train(moving, [(images, labels)], optimizer, learning_rate=lambda _: 0.1)
    assert all(torch.equal(p, b) for p, b in zip(vit.parameters(), before, strict=True))


def test_an_optimiser_of_other_tensors_or_other_entries_is_refused(vit, images, labels):
    moving = MaskedParameters(vit, some_rows(vit))
    with pytest.raises(ValueError, match="optimizer: steps other tensors"):
        train(moving, [(images, labels)], torch.optim.SGD(vit.parameters(), lr=0.1), learning_rate=lambda _: 0.1)
    with pytest.raises(ValueError, match="optimizer: steps other tensors"):
        train(moving, [(images, labels)], SparseSGD([vit.head.bias], [torch.ones(5) > 0]), learning_rate=lambda _: 0.1)
    masks = {name: mask.clone() for name, mask in moving.entries.masks.items()}
    masks["blocks.2.attn.qkv.weight"][0, 0] = True  # one more
    for sparse_rule in (SparseSGD, SparseAdamW):
        other = sparse_rule(moving.parameters.values(), list(masks.values()))
        with pytest.raises(ValueError, match="optimizer: steps other entries"):
            train(moving, [(images, labels)], other, learning_rate=lambda _: 0.1)
        own = sparse_rule(moving.parameters.values(), list(moving.entries.masks.values()))
        train(moving, [(images, labels)], own, learning_rate=lambda _: 0.1)


def test_a_sparse_optimiser_of_whole_tensors_is_welcome_where_all_moves(vit, images, labels):
    moving = MaskedParameters(vit)
    train(
        moving,
        [(images, labels)],
        SparseSGD(*zip(*((p, torch.ones_like(p) > 0) for p in vit.parameters()), strict=True)),
        learning_rate=lambda _: 0.1,
    )
