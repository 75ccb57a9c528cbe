"""Forgetting: vectors taken away again, as far as control allows."""

import copy

import pytest
import torch

from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.models.backbone import Origin
from fedtalos.notes import noted
from fedtalos.training.editing.forgetting import COARSE, HALVINGS, forget, forgetting_factor
from fedtalos.training.editing.task_vectors import apply, task_vector
from fedtalos.training.entries import named_tensors


@pytest.fixture
def tau(vit):
    """A change of two layers."""
    after = copy.deepcopy(vit)
    with torch.no_grad():
        after.blocks[0].norm1.weight.add_(0.5)
        after.blocks[1].mlp.fc1.bias.add_(0.25)
    return task_vector(vit, after)


@pytest.fixture
def pictures() -> LabelledImages:
    return LabelledImages(torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10) % 5)


def factor_of(model, vector) -> float:
    """The factor that a model was edited with, by one of its entries."""
    return float(1 - model.blocks[0].norm1.weight[0].detach()) / 0.5


def test_forgetting_takes_back_what_was_added(vit, tau, pictures):
    added = apply(vit, tau, alpha=0.5)
    found = forget(added, tau, pictures, pictures, alpha=0.5)
    for name, tensor in named_tensors(found.model).items():
        assert tensor.equal(named_tensors(vit)[name])
    assert (found.target_before, found.control_before) == (found.target_before,) * 2
    assert found.control_share == pytest.approx(found.control / found.control_before if found.control_before else 1)


def test_the_factor_leaves_least_of_the_target_and_enough_of_control(vit, tau):
    """Control falls off linearly, and the target faster: the edge is where 5 % of control are gone."""
    before = {name: tensor.clone() for name, tensor in named_tensors(vit).items()}
    asked = []

    def measure(edited):
        alpha = factor_of(edited, tau)
        asked.append(alpha)
        return max(0.0, 0.9 - alpha), 0.8 * (1 - 0.05 * alpha / 0.6)

    alpha = forgetting_factor(vit, tau, measure, control_before=0.8)
    assert 0.6 - 0.4 / 2**HALVINGS <= alpha <= 0.6 + 1e-5
    assert len(asked) <= 11
    assert all(tensor.equal(before[name]) for name, tensor in named_tensors(vit).items())


def test_nothing_more_is_subtracted_than_is_of_use(vit, tau):
    assert forgetting_factor(vit, tau, lambda _: (0.0, 0.8), control_before=0.8) == 0
    assert forgetting_factor(vit, tau, lambda _: (0.5, 0.1), control_before=0.8) == 0  # control is lost already
    once = forgetting_factor(vit, tau, lambda edited: (float(factor_of(edited, tau) < 0.15), 0.8), control_before=0.8)
    assert once == pytest.approx(0.2)


@pytest.mark.parametrize(("slope", "noted_"), [(0.0, False), (0.1, True)])
def test_a_larger_factor_is_spoken_of_only_where_the_largest_is_taken(vit, tau, slope, noted_):
    """Where leaving out was enough, control that is never hurt is no news."""
    noted()
    alpha = forgetting_factor(vit, tau, lambda edited: (0.9 - slope * factor_of(edited, tau), 0.8), control_before=0.8)
    assert alpha == (COARSE[-1] if noted_ else 0)
    assert bool(noted()) == noted_


def test_a_vector_of_another_model_is_refused(vit, tau, pictures):
    vit.origin = Origin("elsewhere", "0123")
    with pytest.raises(InputError, match="not made on this model"):
        forget(vit, tau, pictures, pictures)
