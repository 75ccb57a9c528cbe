import math

import pytest
import torch
from torch import nn

from fedtalos.training.loop import BadUpdateError, freeze_all_but, learning_rate_schedule, make_optimizer, train
from fedtalos.training.masked_parameters import Entries


def dense(vit):
    return Entries({name: torch.ones_like(p, dtype=torch.bool) for name, p in vit.named_parameters()})


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_equals_a_plain_loop(vit, images, labels, rule):
    start = {name: p.detach().clone() for name, p in vit.named_parameters()}
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    if rule == "sgd":
        optimizer = torch.optim.SGD(vit.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(vit.parameters(), lr=0.05, weight_decay=0.01)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(vit(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() * len(y))
    expected = {name: p.detach().clone() for name, p in vit.named_parameters()}

    vit.load_state_dict(start)
    entries = dense(vit)
    freeze_all_but(vit, entries)
    ours = make_optimizer(vit, entries, rule=rule, learning_rate=1.0, momentum=0.9, weight_decay=0.01)
    metrics = train(vit, batches, ours, entries, learning_rate=lambda _: 0.05, clip_norm=1.0)
    assert metrics.examples == 12
    assert metrics.loss_sum == pytest.approx(sum(losses), rel=1e-6)
    for name, p in vit.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-7)


def test_frozen_tensors_get_no_gradient_and_backward_stops_at_the_first_that_moves(vit, images, labels):
    entries = Entries({"blocks.4.attn.qkv.weight": torch.ones_like(vit.blocks[4].attn.qkv.weight, dtype=torch.bool)})
    freeze_all_but(vit, entries)
    reached = []
    for number, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda _m, _i, out, n=number: reached.append((n, out.requires_grad)))
    optimizer = make_optimizer(vit, entries, rule="adamw", learning_rate=0.1, momentum=0.0, weight_decay=0.0)
    train(vit, [(images, labels)], optimizer, entries, learning_rate=lambda _: 0.1, clip_norm=None)
    assert reached == [(n, n >= 4) for n in range(6)]
    assert [name for name, p in vit.named_parameters() if p.grad is not None] == ["blocks.4.attn.qkv.weight"]


def test_a_loss_that_is_not_finite_stops_before_the_step(vit, images, labels):
    entries = dense(vit)
    before = [p.detach().clone() for p in vit.parameters()]
    optimizer = make_optimizer(vit, entries, rule="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0)
    with pytest.raises(BadUpdateError, match=r"local step 1, learning rate 0\.1"):
        train(vit, [(images * math.inf, labels)], optimizer, entries, learning_rate=lambda _: 0.1, clip_norm=None)
    for p, b in zip(vit.parameters(), before, strict=True):
        assert torch.equal(p, b)


def test_a_last_step_that_leaves_values_that_are_not_finite_is_bad(vit, images, labels):
    entries = dense(vit)
    freeze_all_but(vit, entries)
    optimizer = make_optimizer(vit, entries, rule="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    with pytest.raises(BadUpdateError, match=r"the update became not finite at local step 1, learning rate 3e\+38"):
        train(vit, [(images, labels)], optimizer, entries, learning_rate=lambda _: 3e38, clip_norm=1.0)


def test_schedules():
    options = {"warmup": 2, "step_every": 3, "step_gamma": 0.1}
    cosine = learning_rate_schedule("cosine", 1.0, 10, **options)
    assert [cosine(0), cosine(1), cosine(2), cosine(6), cosine(10)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5, 0.0])
    assert learning_rate_schedule("constant", 0.3, 10, **options)(7) == 0.3
    step = learning_rate_schedule("step", 1.0, 10, **options)
    assert [step(2), step(3), step(6.5)] == pytest.approx([1.0, 0.1, 0.01])
