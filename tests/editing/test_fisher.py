"""Scores against a plain one-example loop, and against the errors found in public code for this method."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from fedtalos.data.images import LabelledImages
from fedtalos.errors import TrainingError
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.fisher import activation_bytes, draw_labels, fisher_scores, scored_batches
from fedtalos.training.editing.sensitivity import soften

MODES = ("true", "exact", "empirical", "batch")


@pytest.fixture
def uniforms():
    return torch.from_numpy(generator(0, "uniforms").random((12, 3)))


def everything(model):
    """Masks of all the parameters that layers hold (not the class token and the position embedding)."""
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if "." in n}


def loop_scores(model, images, labels, uniforms, names, weights=None, mode="true"):
    """One example at a time (for `batch`: all at once), one class at a time, autograd's own weight gradients."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for name, value in (weights or {}).items():
        parameters[name] = value.detach().clone().requires_grad_()
    scores = {name: torch.zeros_like(parameters[name]) for name in names}
    size = len(images) if mode == "batch" else 1
    for x, y, u in zip(images.split(size), labels.split(size), uniforms.split(size), strict=True):
        log_p = F.log_softmax(functional_call(model, parameters, (x,)), dim=1)
        if mode == "exact":
            terms = [(log_p[0, c], float(log_p[0, c].detach().exp())) for c in range(log_p.shape[1])]
        elif mode == "empirical":
            terms = [(log_p[0, y[0]], 1.0)]
        else:
            draws = [draw_labels(log_p, u[:, s]) for s in range(u.shape[1])]
            terms = [(log_p.gather(1, drawn[:, None]).sum(), 1 / u.shape[1]) for drawn in draws]
        for value, weight in terms:
            found = torch.autograd.grad(value, [parameters[name] for name in names], retain_graph=True)
            for name, gradient in zip(names, found, strict=True):
                scores[name] += weight * gradient.square()
    return scores


def assert_close(scores, expected):
    assert scores.keys() == expected.keys()
    for name in scores:
        scale = expected[name].max() + 1e-30
        torch.testing.assert_close(scores[name] / scale, expected[name] / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_one_example_loop(mode, vit, images, labels, uniforms):
    masks = everything(vit)  # every kind of layer: the patch embedding's Conv2d, Linear, LayerNorm
    expected = loop_scores(vit, images, labels, uniforms, list(masks), mode=mode)
    for chunk in (1, 5, 12):
        assert_close(fisher_scores(vit, [(images, labels, uniforms)], masks, mode=mode, chunk=chunk), expected)
    if mode != "batch":
        halves = [tuple(t[part] for t in (images, labels, uniforms)) for part in (slice(7), slice(7, None))]
        assert_close(fisher_scores(vit, halves, masks, mode=mode), expected)


def test_every_kind_of_layer_and_shape_is_scored():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))
            self.norm = nn.LayerNorm(6)
            self.flat = nn.Linear(6, 4, bias=False)  # on (B, I): no tokens

        def forward(self, x):
            x = self.norm(self.conv(x).permute(0, 2, 3, 1))  # (B, H, W, O)
            return self.flat(x.tanh().mean((1, 2)))

    torch.manual_seed(0)
    model, images, labels = Odd(), torch.randn(6, 3, 7, 8), torch.arange(6) % 4
    uniforms = torch.rand(6, 1)
    masks = everything(model)
    expected = loop_scores(model, images, labels, uniforms, list(masks))
    assert_close(fisher_scores(model, [(images, labels, uniforms)], masks, chunk=4), expected)


def test_more_labels_a_weight_and_classes_come_closer_to_the_expectation(vit, images, labels):
    masks = eligible_entries(vit).masks
    exact = fisher_scores(vit, [(images, labels, torch.zeros(12, 1))], masks, mode="exact")

    def distance(samples):
        drawn = torch.from_numpy(generator(1, "many").random((12, samples)))
        scores = fisher_scores(vit, [(images, labels, drawn)], masks)
        return sum(float((scores[n] - exact[n]).norm()) for n in masks)

    assert distance(64) < 0.4 * distance(1)


def test_softened_weights_are_used_and_the_model_is_not_touched(vit, images, labels, uniforms):
    eligible = eligible_entries(vit)
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    flags = [p.requires_grad for p in vit.parameters()]
    kept = torch.from_numpy(generator(0, "kept").random(len(eligible)) < 0.3).to(eligible.device)
    weights = soften(vit, eligible, kept, 0.01)
    scores = fisher_scores(vit, [(images, labels, uniforms)], eligible.masks, weights)
    assert_close(scores, loop_scores(vit, images, labels, uniforms, list(eligible.masks), weights))
    for name, p in vit.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    assert flags == [p.requires_grad for p in vit.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


def test_the_papers_entries_outside_the_blocks_are_scored_as_the_loop_does(vit, images, labels, uniforms):
    paper = eligible_entries(vit, "paper")
    weights = soften(vit, paper, torch.arange(len(paper), device=paper.device) % 3 > 0, 0.01)
    scores = fisher_scores(vit, [(images, labels, uniforms)], paper.masks, weights, chunk=5)
    expected = loop_scores(vit, images, labels, uniforms, paper.masks, weights)
    assert_close(
        {n: s * paper.masks[n] for n, s in scores.items()}, {n: s * paper.masks[n] for n, s in expected.items()}
    )


@pytest.mark.parametrize("which", ["attention", "qk", "biases"])
def test_fewer_eligible_entries_have_the_same_scores(which, vit, images, labels, uniforms):
    few, batch = eligible_entries(vit, which), (images, labels, uniforms)
    all_scores = fisher_scores(vit, [batch], eligible_entries(vit).masks)
    scores = fisher_scores(vit, [batch], few.masks)
    torch.testing.assert_close(few.gather(scores), few.gather(all_scores), rtol=1e-4, atol=1e-12)
    if which == "qk":
        assert not scores["blocks.3.attn.qkv.weight"][2 * 96 :].any()  # v's rows cost nothing


def test_the_graph_begins_at_the_first_scored_layer(vit, images, labels, uniforms):
    reached = []
    for number, block in enumerate(vit.blocks):
        block.norm1.register_full_backward_hook(lambda *_, number=number: reached.append(number))
    last = {name: m for name, m in eligible_entries(vit).masks.items() if name.startswith("blocks.4.attn.proj")}
    fisher_scores(vit, [(images, labels, uniforms[:, :1])], last)
    assert set(reached) == {5}


def test_bf16_forward_gives_float32_scores_close_by(vit, images, labels):
    masks, batch = eligible_entries(vit).masks, (images, labels, torch.zeros(12, 1))
    exact = fisher_scores(vit, [batch], masks, mode="empirical")
    scores = fisher_scores(vit, [batch], masks, mode="empirical", precision="bf16")
    for name in masks:
        assert scores[name].dtype == torch.float32
        assert (scores[name] - exact[name]).norm() < 0.05 * exact[name].norm() + 1e-12


def test_it_is_not_the_squared_batch_gradient(vit, images, labels, uniforms):
    masks, batch = eligible_entries(vit).masks, (images, labels, uniforms[:, :1])
    scores, common_error = (fisher_scores(vit, [batch], masks, mode=mode) for mode in ("true", "batch"))
    name = "blocks.0.attn.qkv.weight"
    assert not torch.allclose(
        scores[name] / scores[name].sum(), common_error[name] / common_error[name].sum(), rtol=0.1
    )


def test_key_bias_has_zero_gradient_and_is_not_eligible(vit, images, labels, uniforms):
    name = "blocks.2.attn.qkv.bias"
    masks = {name: torch.ones(3 * 96, dtype=torch.bool)}
    q, k, v = fisher_scores(vit, [(images, labels, uniforms)], masks)[name].chunk(3)
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


def test_other_layers_are_refused(images, labels, uniforms):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 5))
    twice = nn.Sequential(nn.LayerNorm((8, 8)), nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(TypeError, match="got LayerNorm"):
        fisher_scores(twice, [(images, labels, uniforms)], {"0.weight": torch.ones(8, 8, dtype=torch.bool)})
    with pytest.raises(
        TypeError, match="expected a Linear, plain Conv2d or LayerNorm of one dimension, got BatchNorm2d"
    ):
        fisher_scores(model, [(images, labels, uniforms)], {"0.weight": torch.ones(3, dtype=torch.bool)})


def test_one_chunks_activations_are_gone_before_the_next_come(vit, images, labels, uniforms):
    alive, inputs = [], []

    def look(module, args):
        alive.append(sum(reference() is not None for reference in inputs))
        inputs.append(weakref.ref(args[0]))

    for block in vit.blocks:
        block.mlp.fc2.register_forward_pre_hook(look)
    fisher_scores(vit, [(images, labels, uniforms)], eligible_entries(vit).masks, chunk=4)
    assert alive[6::6] == [0, 0]  # of six blocks' inputs, when the second and the third chunk reach the first block


def test_scores_that_are_not_finite_are_an_error(vit, images, labels, uniforms):
    images[3, 0, 0, 0] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        fisher_scores(vit, [(images, labels, uniforms)], eligible_entries(vit).masks)


def test_activation_bytes_grow_with_the_images(vit):
    images = torch.randn(6, 3, 8, 8, generator=torch_generator(0, "more")).to(vit.pos_embed.device)
    one, six = (activation_bytes(vit, images[:n]) for n in (1, 6))
    assert six == pytest.approx(6 * one, rel=0.02)
    assert one > 6 * 17 * 4 * 96 * 4  # at least what each block's fc1 gives: tokens, outputs, bytes


def test_labels_are_drawn_by_the_images_id_whoever_holds_it(vit, labels):
    pixels = torch.arange(12 * 3 * 64).view(12, 3, 8, 8).remainder(256).to(torch.uint8)
    images = LabelledImages(pixels.to(labels.device), labels)
    (x, y, all_uniforms), *others = scored_batches(vit, images, samples=2, seed=3, number=4)
    assert not others
    assert (x.shape, x.dtype) == ((12, 3, 8, 8), torch.float32)
    assert torch.equal(y, labels)
    for id_ in range(12):
        assert all_uniforms[id_].tolist() == generator(3, "labels", 4, id_).random(2).tolist()
    some = list(scored_batches(vit, images, np.array([7, 2, 9]), samples=2, seed=3, number=4, batch_size=2))
    assert [len(batch[1]) for batch in some] == [2, 1]
    chosen = torch.tensor([7, 2, 9])
    for found, whole in zip(map(torch.cat, zip(*some, strict=True)), (x, y, all_uniforms), strict=True):
        assert torch.equal(found, whole[chosen])
    again = next(scored_batches(vit, images, samples=2, seed=3, number=5))[2]
    assert not torch.equal(again, all_uniforms)
