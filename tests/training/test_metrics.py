"""Metrics: sums that add, and the interval of a share."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fedtalos.metrics import Metrics, wilson


@given(st.integers(1, 5000).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_interval_is_scipys(counts):
    right, count = counts
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert Metrics(0.0, right, count).interval == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_of_nothing_there_is_no_interval():
    assert all(map(math.isnan, wilson(0.5, 0)))
    assert all(map(math.isnan, Metrics().interval))
