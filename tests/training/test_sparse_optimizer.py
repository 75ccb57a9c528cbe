import copy

import pytest
import torch
from torch import nn

from fedtalos.randomness import torch_generator
from fedtalos.training.sparse_optimizer import SparseAdamW, SparseSGD

RULES = {
    "sgd": (torch.optim.SGD, SparseSGD, {"lr": 0.1}),
    "sgd momentum decay": (torch.optim.SGD, SparseSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "adamw": (torch.optim.AdamW, SparseAdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw no decay": (torch.optim.AdamW, SparseAdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.0}),
}


def parameters():
    draw = torch_generator(0, "parameters")
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((7, 5), (11,), (2, 3, 4))]


def gradients(step):
    draw = torch_generator(step, "gradients")
    return [torch.randn(shape, generator=draw) for shape in ((7, 5), (11,), (2, 3, 4))]


def masks(share):
    draw = torch_generator(0, "masks")
    return [torch.rand(shape, generator=draw) < share for shape in ((7, 5), (11,), (2, 3, 4))]


def run(optimizer, params, steps=5, start=0):
    for step in range(start, start + steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    return params


@pytest.mark.parametrize("rule", RULES)
def test_all_true_equals_torch(rule):
    torch_rule, sparse_rule, options = RULES[rule]
    expected = parameters()
    run(torch_rule(expected, **options, foreach=False), expected)
    params = parameters()
    run(sparse_rule(params, masks(2.0), **options), params)
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p, e)


@pytest.mark.parametrize("rule", RULES)
def test_active_entries_move_as_under_torch_and_frozen_ones_keep_their_bits(rule):
    torch_rule, sparse_rule, options = RULES[rule]
    expected = parameters()
    run(torch_rule(expected, **options, foreach=False), expected, steps=20)
    params, chosen = parameters(), masks(0.4)
    params[0].data.view(-1)[~chosen[0].flatten()] = -0.0  # the sign of a frozen zero stays too
    before = [p.detach().clone() for p in params]
    run(sparse_rule(params, chosen, **options), params, steps=20)
    for p, e, b, mask in zip(params, expected, before, chosen, strict=True):
        torch.testing.assert_close(p[mask], e[mask], rtol=1e-5, atol=1e-7)
        assert torch.equal(p[~mask].view(torch.int32), b[~mask].view(torch.int32))


@pytest.mark.parametrize("rule", RULES)
def test_state_is_held_for_active_entries_only_and_survives_a_round_trip(rule):
    _, sparse_rule, options = RULES[rule]
    chosen = masks(0.4)
    straight = parameters()
    optimizer = sparse_rule(straight, chosen, **options)
    run(optimizer, straight, steps=3)
    for p, mask in zip(straight, chosen, strict=True):
        for value in optimizer.state[p].values():
            assert value.numel() in (1, int(mask.sum()))
    resumed = [nn.Parameter(p.detach().clone()) for p in straight]
    again = sparse_rule(resumed, chosen, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, straight, start=3)
    run(again, resumed, start=3)
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("sparse_rule", [SparseSGD, SparseAdamW])
def test_wrong_masks_are_errors(sparse_rule):
    params = parameters()
    with pytest.raises(TypeError):
        sparse_rule(params)
    with pytest.raises(ValueError, match="one per parameter, 3, got 2"):
        sparse_rule(params, masks(1.0)[:2])
    with pytest.raises(ValueError, match="mask 1: expected bool of shape"):
        sparse_rule(params, [masks(1.0)[0], torch.ones(3, dtype=torch.bool), masks(1.0)[2]])
    with pytest.raises(ValueError, match="mask 0: expected bool"):
        sparse_rule(params, [mask.float() for mask in masks(1.0)])
