import pytest
import torch
from torch import nn

from fedtalos.models.row_sparse_linear import Linear
from fedtalos.randomness import torch_generator
from fedtalos.training.loop import train
from fedtalos.training.masked_parameters import MaskedParameters, head_mask
from fedtalos.training.sparse_optimizer import make_optimizer


def scattered(vit, share=0.05):
    draw = torch_generator(1, "masks")
    return {name: torch.rand(p.shape, generator=draw) < share for name, p in vit.named_parameters()}


def one_row(vit):
    mask = torch.zeros_like(vit.blocks[4].attn.qkv.weight, dtype=torch.bool)
    mask[7] = True
    return {"blocks.4.attn.qkv.weight": mask}


def step(moving, images, labels):
    optimizer = make_optimizer(moving.parameters, moving.entries, rule="adamw", learning_rate=0.1)
    return train(moving, [(images, labels)], optimizer, learning_rate=lambda _: 0.1)


def with_gradient(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_what_the_mask_names_moves_and_the_rest_is_frozen_when_it_is_made(vit):
    moving = MaskedParameters(vit, one_row(vit))
    assert with_gradient(vit) == ["blocks.4.attn.qkv.weight"]
    assert len(moving) == vit.blocks[4].attn.qkv.weight.shape[1]
    assert moving.nbytes == 4 * len(moving)
    rows = [module.active_rows for module in vit.modules() if isinstance(module, Linear)]
    assert sum(active is not None for active in rows) == 1


def test_without_a_mask_everything_moves(vit):
    moving = MaskedParameters(vit)
    assert moving.entries.whole
    assert len(moving) == sum(p.numel() for p in vit.parameters())
    assert torch.equal(moving.vector(), nn.utils.parameters_to_vector(vit.parameters()))


def test_two_masks_of_one_model_train_in_turns(vit, images, labels):
    """What another mask let move, rows that compute gradients included, is frozen again when training begins."""
    rows, head = MaskedParameters(vit, one_row(vit)), MaskedParameters(vit, head_mask(vit))
    assert with_gradient(vit) == ["head.weight", "head.bias"]  # the last one made
    for moving in (rows, head, rows):
        before = {name: p.detach().clone() for name, p in vit.named_parameters()}
        step(moving, images, labels)
        for name, p in vit.named_parameters():
            mask = moving.entries.masks.get(name, torch.zeros_like(p, dtype=torch.bool))
            assert torch.equal(p[~mask], before[name][~mask])
            assert not mask.any() or bool((p[mask] != before[name][mask]).any())
        assert with_gradient(vit) == list(moving.parameters)
    alone = MaskedParameters(vit)  # dense: all rows again
    alone.freeze()
    assert all(module.active_rows is None for module in vit.modules() if isinstance(module, Linear))


def test_frozen_tensors_get_no_gradient_and_backward_stops_at_the_first_that_moves(vit, images, labels):
    mask = {"blocks.4.attn.qkv.weight": torch.ones_like(vit.blocks[4].attn.qkv.weight, dtype=torch.bool)}
    reached = []
    for number, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda _m, _i, out, n=number: reached.append((n, out.requires_grad)))
    step(MaskedParameters(vit, mask), images, labels)
    assert reached == [(n, n >= 4) for n in range(6)]
    assert [name for name, p in vit.named_parameters() if p.grad is not None] == ["blocks.4.attn.qkv.weight"]


def test_copies_and_vectors_go_out_and_come_back(vit):
    mask = scattered(vit)
    moving = MaskedParameters(vit, mask)
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    theta, vector = moving.copy(), moving.vector()
    moving.write(vector + 1)
    assert torch.equal(moving.vector(), vector + 1)
    for name, p in vit.named_parameters():
        assert torch.equal(p[~mask[name]], before[name][~mask[name]])
    moving.load(theta)
    assert all(torch.equal(p, before[name]) for name, p in vit.named_parameters())


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ({"head.bais": torch.ones(5, dtype=torch.bool)}, r"mask: head.bais has shape \(5,\), the model no such"),
        ({"head.bias": torch.ones(4, dtype=torch.bool)}, r"mask: head.bias has shape \(4,\), the model \(5,\)"),
        ({"head.bias": torch.ones(1, 5, dtype=torch.bool)}, r"mask: head.bias has shape \(1, 5\)"),
        ({"head.bias": torch.zeros(5, dtype=torch.bool)}, "at least one True"),
    ],
)
def test_a_mask_of_other_names_or_shapes_or_of_nothing_is_refused_and_freezes_nothing(vit, mask, says):
    with pytest.raises(ValueError, match=says):
        MaskedParameters(vit, mask)
    assert len(with_gradient(vit)) == len(list(vit.parameters()))


def test_a_pair_is_passed_on_as_it_is_and_takes_no_second_mask(vit):
    moving = MaskedParameters.of(vit, one_row(vit))
    assert len(moving) == vit.blocks[4].attn.qkv.weight.shape[1]
    assert MaskedParameters.of(moving, None) is moving
    with pytest.raises(ValueError, match="mask: given with MaskedParameters"):
        MaskedParameters.of(moving, one_row(vit))


def test_clipping_equals_torch_when_dense_and_ignores_frozen_entries(vit, images, labels):
    def gradients():
        vit.zero_grad()
        nn.functional.cross_entropy(vit(images), labels).backward()
        return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}

    gradients()
    norm = nn.utils.clip_grad_norm_(vit.parameters(), 0.1)
    expected = {name: p.grad.clone() for name, p in vit.named_parameters()}
    dense = MaskedParameters(vit)
    gradients()
    assert dense.clip_gradients(0.1).item() == pytest.approx(norm.item(), rel=1e-5)
    for name, p in vit.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-9)

    masks = scattered(vit)
    moving = MaskedParameters(vit, masks)
    raw = gradients()
    active = torch.cat([raw[name][mask] for name, mask in masks.items() if mask.any()])
    assert moving.clip_gradients(1e9).item() == pytest.approx(active.norm().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "stages"),
    [("head.bias", 8), ("norm.bias", 7), ("blocks.0.norm1.weight", 0), ("blocks.3.norm1.weight", 4), ("pos_embed", 0)],
)
def test_features_are_kept_of_more_than_the_embedding(vit, name, stages):
    """A ViT's embedding alone is cheaper to compute than to keep."""
    mask = {name: torch.ones_like(vit.get_parameter(name), dtype=torch.bool, requires_grad=False)}
    assert MaskedParameters(vit, mask).frozen_stages == stages
