"""Batches larger than the memory: the same gradients, in parts."""

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtalos.devices import out_of_memory
from fedtalos.training.micro_batches import MicroBatch


def setting(count):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(count, 5), torch.arange(count) % 3


class Fits:
    """A model of which only so many images at once fit into memory; what is too much leaves gradients behind."""

    def __init__(self, model, capacity):
        self.model, self.capacity = model, capacity

    def __call__(self, images):
        logits = self.model(images)
        if len(images) > self.capacity:
            logits.sum().backward()  # so that a part that does not fit may have left some gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits


def sizes_said(log):
    return [record.args for record in log.records if record.name == "fedtalos.training.micro_batches"]


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), capacity=st.integers(1, 40))
def test_parts_have_the_loss_answers_and_gradient_of_the_batch(count, capacity):
    model, optimizer, images, labels = setting(count)
    micro_batch = MicroBatch()
    loss, correct = micro_batch.backward(Fits(model, capacity), optimizer, images, labels)
    found = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    logits = model(images)
    whole = F.cross_entropy(logits, labels)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    assert int(correct) == int((logits.argmax(1) == labels).sum())
    for gradient, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-6)
    assert (micro_batch.size is not None) == (count > capacity)


def test_what_fits_is_the_same_bits_and_what_did_not_is_said_once(caplog):
    model, optimizer, images, labels = setting(8)
    micro_batch = MicroBatch()
    whole = F.cross_entropy(model(images), labels)
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    assert torch.equal(micro_batch.backward(Fits(model, 8), optimizer, images, labels)[0], whole.detach())
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            micro_batch.backward(Fits(model, 2), optimizer, images, labels)
    assert micro_batch.size == 2
    assert sizes_said(caplog) == [(8, 4), (4, 2)]
    assert "8 images at once do not fit into memory" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (torch.OutOfMemoryError("no"), 4),
        (RuntimeError("MPS backend out of memory (used 3 GB)"), 4),
        (RuntimeError("x"), 1),
    ],
)
def test_one_image_that_does_not_fit_and_other_errors_are_raised(error, attempts):
    _, optimizer, images, labels = setting(8)
    calls = []

    def fail(images):
        calls.append(len(images))
        raise error

    with pytest.raises(RuntimeError) as raised:
        MicroBatch().backward(fail, optimizer, images, labels)
    assert raised.value is error
    assert calls == [8, 4, 2, 1][:attempts]
    assert out_of_memory(error) == (attempts > 1)
