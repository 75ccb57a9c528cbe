import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtalos.randomness import generator, torch_generator
from fedtalos.training.entries import Entries, Values, all_finite, named_tensors


def random_masks(vit, share=0.3):
    draw = torch_generator(1, "masks")
    return {name: (torch.rand(p.shape, generator=draw) < share).to(p.device) for name, p in vit.named_parameters()}


def test_all_true_equals_parameters_to_vector(vit):
    entries = Entries({name: torch.ones_like(p, dtype=torch.bool) for name, p in vit.named_parameters()})
    expected = torch.nn.utils.parameters_to_vector(vit.parameters())
    assert torch.equal(entries.gather(named_tensors(vit)), expected)
    assert entries.whole
    assert len(entries) == len(expected)
    assert entries.nbytes == 4 * len(expected)


def test_gather_after_scatter_returns_the_vector_and_leaves_the_rest(vit):
    masks = random_masks(vit)
    entries, tensors = Entries(masks), named_tensors(vit)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    vector = torch.randn(len(entries), generator=torch_generator(2, "v")).to(entries.device)
    entries.scatter(vector, tensors)
    assert torch.equal(entries.gather(tensors), vector)
    for name, mask in masks.items():
        assert torch.equal(tensors[name][~mask], before[name][~mask])


def some_masks(shapes, seed):
    rng = generator(seed, "masks")
    return {str(i): torch.from_numpy(rng.random(shape) < 0.5) for i, shape in enumerate(shapes)}


shapes_and_seed = (
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(0, 99),
)


@settings(max_examples=30, deadline=None)
@given(*shapes_and_seed)
def test_unflatten_is_the_inverse_of_gather(shapes, seed):
    masks = some_masks(shapes, seed)
    if not any(bool(mask.any()) for mask in masks.values()):
        return
    entries = Entries(masks)
    vector = torch.arange(len(entries)).float() + 1
    tensors = entries.unflatten(vector)
    assert torch.equal(entries.gather(tensors), vector)
    assert sum(int(t.count_nonzero()) for t in tensors.values()) == len(entries)


@settings(max_examples=30, deadline=None)
@given(*shapes_and_seed)
def test_moving_rows_are_views_that_hold_every_chosen_entry(shapes, seed):
    masks = some_masks(shapes, seed)
    if not any(bool(mask.any()) for mask in masks.values()):
        return
    entries = Entries(masks)
    tensors = {name: torch.zeros(mask.shape) for name, mask in masks.items()}
    entries.scatter(torch.ones(len(entries)), tensors)
    rows = entries.moving_rows(tensors)
    assert sum(int(part.sum()) for part in rows) == len(entries)
    assert all(part.is_contiguous() and part[0].any() and part[-1].any() for part in rows)
    values = Values(rows)
    assert all(torch.equal(part, row) for part, row in zip(values.parts, rows, strict=True))
    values.vector.fill_(7)  # parts share the vector's memory, and not the tensors'
    assert all(bool((part == 7).all()) for part in values.parts)
    assert sum(int(part.sum()) for part in rows) == len(entries)


def test_a_tensor_without_a_true_entry_is_left_out():
    entries = Entries({"a": torch.zeros(2, 3, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)})
    assert list(entries.masks) == ["b"]


def test_bad_masks_are_refused():
    with pytest.raises(TypeError, match="bool"):
        Entries({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="at least one True"):
        Entries({"w": torch.zeros(2, dtype=torch.bool)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_one_value_that_is_not_finite_or_overflows_is_found(value):
    tensors = [torch.zeros(3), torch.ones(2, 2)]
    assert all_finite(tensors)
    tensors[1][0] = value
    assert not all_finite(tensors)
