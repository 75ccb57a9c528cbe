"""Scores against a plain one-example loop, and against the errors found in public code for this method."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from fedtalos.randomness import generator
from fedtalos.training.editing import eligible_entries, soften
from fedtalos.training.fisher import draw_labels, fisher_scores


@pytest.fixture
def uniforms():
    return torch.from_numpy(generator(0, "uniforms").random(12))


def loop_scores(vit, images, uniforms, names, weights=None):
    """One example at a time, autograd's own weight gradients."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in vit.named_parameters()}
    for name, value in (weights or {}).items():
        parameters[name] = value.detach().clone().requires_grad_()
    scores = {name: torch.zeros_like(parameters[name]) for name in names}
    for image, u in zip(images, uniforms, strict=True):
        log_p = F.log_softmax(functional_call(vit, parameters, (image[None],)), dim=1)
        drawn = draw_labels(log_p, u[None])
        found = torch.autograd.grad(log_p[0, drawn[0]], [parameters[name] for name in names])
        for name, gradient in zip(names, found, strict=True):
            scores[name] += gradient.square()
    return scores


def test_equals_the_one_example_loop(vit, images, uniforms):
    names = list(eligible_entries(vit).masks)
    expected = loop_scores(vit, images, uniforms, names)
    for chunk in (1, 5, 12):
        scores = fisher_scores(vit, [(images[:7], uniforms[:7]), (images[7:], uniforms[7:])], names, chunk=chunk)
        for name in names:
            scale = expected[name].max()
            torch.testing.assert_close(scores[name] / scale, expected[name] / scale, rtol=1e-4, atol=1e-6)


def test_softened_weights_are_used_and_the_model_is_not_touched(vit, images, uniforms):
    eligible = eligible_entries(vit)
    names = list(eligible.masks)
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    flags = [p.requires_grad for p in vit.parameters()]
    kept = torch.from_numpy(generator(0, "kept").random(len(eligible)) < 0.3)
    weights = soften(vit, eligible, kept, 0.01)
    scores = fisher_scores(vit, [(images, uniforms)], names, weights)
    expected = loop_scores(vit, images, uniforms, names, weights)
    for name in names:
        scale = expected[name].max()
        torch.testing.assert_close(scores[name] / scale, expected[name] / scale, rtol=1e-4, atol=1e-6)
    for name, p in vit.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    assert flags == [p.requires_grad for p in vit.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


def test_it_is_not_the_squared_batch_gradient(vit, images, uniforms):
    name = "blocks.0.attn.qkv.weight"
    scores = fisher_scores(vit, [(images, uniforms)], [name])[name]
    log_p = F.log_softmax(vit(images), dim=1)
    log_p.gather(1, draw_labels(log_p, uniforms)[:, None]).sum().backward()
    batch = vit.get_parameter(name).grad.square()
    assert not torch.allclose(scores / scores.sum(), batch / batch.sum(), rtol=0.1)


def test_key_bias_has_zero_gradient_and_is_not_eligible(vit, images, uniforms):
    name = "blocks.2.attn.qkv.bias"
    q, k, v = fisher_scores(vit, [(images, uniforms)], [name])[name].chunk(3)
    assert k.max() < 1e-12 * max(q.max(), v.max())
    mask = eligible_entries(vit).masks[name].chunk(3)
    assert [bool(part.all()) for part in mask] == [True, False, True]
    assert not mask[1].any()


def test_labels_are_drawn_from_the_model_itself():
    log_p = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(4000, 4)
    drawn = draw_labels(log_p, torch.from_numpy(generator(0, "u").random(4000)))
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.0, 0.5, 0.3]), atol=0.03, rtol=0)
    assert drawn.bincount(minlength=4)[1] == 0
    edges = draw_labels(log_p[:3], torch.tensor([0.0, 0.1999, 0.99999999]))
    assert edges.tolist() == [0, 0, 3]


def test_other_layers_are_refused(vit, images, uniforms):
    with pytest.raises(TypeError, match="Conv2d"):
        fisher_scores(vit, [(images, uniforms)], ["patch_embed.proj.weight"])
