"""Batches larger than the memory: the same gradients, in parts."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtalos.training.micro_batches import MicroBatch, out_of_memory


def setting(count):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(count, 5).double(), torch.arange(count) % 3


def backward(model, capacity, images, labels, share):
    logits = model(images)
    loss = F.cross_entropy(logits, labels) * share
    loss.backward()  # first, so that a part that does not fit may have left some gradients behind
    if len(images) > capacity:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return loss.detach(), (logits.argmax(1) == labels).sum()


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), capacity=st.integers(1, 40))
def test_parts_have_the_loss_answers_and_gradient_of_the_batch(count, capacity):
    model, optimizer, images, labels = setting(count)
    told = []
    loss, correct = MicroBatch(told.append).backward(partial(backward, model, capacity), optimizer, images, labels)
    found = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    logits = model(images)
    whole = F.cross_entropy(logits, labels)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    assert int(correct) == int((logits.argmax(1) == labels).sum())
    for gradient, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)
    assert bool(told) == (count > capacity)


def test_what_fits_is_the_same_bits_and_what_did_not_is_said_once():
    model, optimizer, images, labels = setting(8)
    told, micro_batch = [], MicroBatch(lambda text: told.append(text))
    whole = backward(model, 8, images, labels, 1.0)[0]
    expected = [p.grad.clone() for p in model.parameters()]
    assert torch.equal(micro_batch.backward(partial(backward, model, 8), optimizer, images, labels)[0], whole)
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    for _ in range(3):
        micro_batch.backward(partial(backward, model, 2), optimizer, images, labels)
    assert micro_batch.size == 2
    assert [text.split()[0] for text in told] == ["8", "4"]


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

    def fail(images, labels, share):
        calls.append(len(images))
        raise error

    with pytest.raises(RuntimeError) as raised:
        MicroBatch().backward(fail, optimizer, images, labels)
    assert raised.value is error
    assert calls == [8, 4, 2, 1][:attempts]
    assert out_of_memory(error) == (attempts > 1)
