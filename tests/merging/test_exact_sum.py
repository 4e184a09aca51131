"""Sums that are correctly rounded, against `math.fsum`."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.merging.methods import exact_sum
from deltaworks.merging.methods.exact_sum import exact_sums

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=50), st.integers(1, 5))
def test_every_sum_is_correctly_rounded(rows: list[tuple[float, float]], parts: int) -> None:
    values = np.array(rows)
    try:
        wanted = [math.fsum(column.tolist()) for column in values.T]
    except OverflowError:
        # It also gives up where the sum is finite and only what it meets on the way is not.
        return
    assert exact_sums(np.array_split(values, parts)) == wanted


@given(st.lists(st.floats(min_value=-1e-300, max_value=1e-300), min_size=1, max_size=50))
def test_sums_of_what_is_nearly_nothing(values: list[float]) -> None:
    assert exact_sums([np.array(values)[:, None]]) == [math.fsum(values)]


def test_what_cancels_leaves_the_rest() -> None:
    assert exact_sums([np.array([[1e308], [1.0], [-1e308], [5e-324]])]) == [1.0]
    assert exact_sums([np.array([[1.0], [5e-324], [-1.0]])]) == [5e-324]


def test_more_values_than_an_accumulator_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=(100, 3))
    monkeypatch.setattr(exact_sum, "_MAX_VALUES", 7)
    assert exact_sums([values]) == [math.fsum(column.tolist()) for column in values.T]


def test_what_is_not_finite_stays_so() -> None:
    found = exact_sums([np.array([[math.inf, math.nan, 1.0], [1.0, 2.0, 2.0]])])
    assert found[0] == math.inf
    assert math.isnan(found[1])
    assert found[2] == 3.0


def test_a_sum_that_is_no_number() -> None:
    with pytest.raises(OverflowError):
        exact_sums([np.full((3, 1), 1.7e308)])
