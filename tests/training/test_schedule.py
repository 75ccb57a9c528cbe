import pytest

from fedtalos.training.schedule import Schedule


def test_schedules():
    options = {"warmup": 2, "step_every": 3, "step_gamma": 0.1}
    cosine = Schedule(1.0, 10, "cosine", **options)
    assert [cosine(0), cosine(1), cosine(2), cosine(6), cosine(10)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5, 0.0])
    assert Schedule(0.3, 10, "constant", **options)(7) == 0.3
    step = Schedule(1.0, 10, "step", **options)
    assert [step(2), step(3), step(6.5)] == pytest.approx([1.0, 0.1, 0.01])
