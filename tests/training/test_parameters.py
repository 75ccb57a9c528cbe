import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtalos.randomness import generator, torch_generator
from fedtalos.training.masked_parameters import Entries, clip_gradients, named_tensors


def random_masks(vit, share=0.3):
    draw = torch_generator(1, "masks")
    return {name: torch.rand(p.shape, generator=draw) < share for name, p in vit.named_parameters()}


def test_all_true_equals_parameters_to_vector(vit):
    entries = Entries({name: torch.ones_like(p, dtype=torch.bool) for name, p in vit.named_parameters()})
    expected = torch.nn.utils.parameters_to_vector(vit.parameters())
    assert torch.equal(entries.gather(named_tensors(vit)), expected)
    assert entries.whole
    assert len(entries) == len(expected)


def test_gather_after_scatter_returns_the_vector_and_leaves_the_rest(vit):
    masks = random_masks(vit)
    entries, tensors = Entries(masks), named_tensors(vit)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    vector = torch.randn(len(entries), generator=torch_generator(2, "v"))
    entries.scatter(vector, tensors)
    assert torch.equal(entries.gather(tensors), vector)
    for name, mask in masks.items():
        assert torch.equal(tensors[name][~mask], before[name][~mask])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 99))
def test_unflatten_is_the_inverse_of_gather(shapes, seed):
    rng = generator(seed, "masks")
    masks = {str(i): torch.from_numpy(rng.random(shape) < 0.5) for i, shape in enumerate(shapes)}
    if not any(bool(mask.any()) for mask in masks.values()):
        return
    entries = Entries(masks)
    vector = torch.arange(len(entries)).float() + 1
    tensors = entries.unflatten(vector)
    assert torch.equal(entries.gather(tensors), vector)
    assert sum(int(t.count_nonzero()) for t in tensors.values()) == len(entries)


def test_bad_masks_are_refused():
    with pytest.raises(TypeError, match="bool"):
        Entries({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="at least one True"):
        Entries({"w": torch.zeros(2, dtype=torch.bool)})


def test_clipping_equals_torch_when_dense_and_ignores_frozen_entries(vit, images, labels):
    def gradients():
        vit.zero_grad()
        torch.nn.functional.cross_entropy(vit(images), labels).backward()
        return {name: p.grad.clone() for name, p in vit.named_parameters()}

    parameters = dict(vit.named_parameters())
    gradients()
    norm = torch.nn.utils.clip_grad_norm_(vit.parameters(), 0.1)
    expected = {name: p.grad.clone() for name, p in parameters.items()}
    gradients()
    dense = Entries({name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()})
    assert clip_gradients(parameters, dense, 0.1) == pytest.approx(norm.item(), rel=1e-5)
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-9)

    raw = gradients()
    masks = random_masks(vit, 0.05)
    active = torch.cat([raw[name][mask] for name, mask in masks.items()])
    assert clip_gradients(parameters, Entries(masks), 1e9) == pytest.approx(active.norm().item(), rel=1e-5)
