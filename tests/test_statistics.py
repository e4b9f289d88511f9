"""Standard errors of ratios and of paired differences, against the textbook's for means and against the jackknife."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusechat.evaluate.statistics import paired_difference, ratio

numbers = st.floats(-100, 100).map(lambda value: round(value, 3))
weights = st.floats(0.5, 50).map(lambda value: round(value, 3))
pairs = st.lists(st.tuples(numbers, weights), min_size=2, max_size=12)


def named(values: list[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {str(index): pair for index, pair in enumerate(values)}


def test_by_hand() -> None:
    """(1, 2), (3, 2), (2, 4): the ratio is 6/8; residuals -0.5, 1.5, -1; sqrt(3/2 · 3.5) / 8."""
    found = ratio(named([(1, 2), (3, 2), (2, 4)]))
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(1.5 * 3.5) / 8)
    assert found.n == 3


@given(st.lists(numbers, min_size=2, max_size=20))
def test_of_equal_weights_it_is_the_mean_and_its_standard_error(values: list[float]) -> None:
    found = ratio(named([(value, 1) for value in values]))
    assert found.value == pytest.approx(statistics.mean(values), abs=1e-9)
    assert found.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


@given(pairs, st.floats(0.1, 10))
def test_units_scale_and_the_order_is_nothing(values: list[tuple[float, float]], factor: float) -> None:
    found = ratio(named(values))
    scaled = ratio(named([(factor * part, weight) for part, weight in values]))
    assert scaled.value == pytest.approx(factor * found.value, abs=1e-9)
    assert scaled.standard_error == pytest.approx(factor * found.standard_error, abs=1e-9)
    assert ratio(named(values[::-1])) == found


def test_it_is_near_the_jackknife() -> None:
    draw = np.random.default_rng(0)
    weight = draw.integers(5, 40, 200).astype(float)
    part = weight * draw.normal(2, 0.3, 200)
    left_out = (part.sum() - part) / (weight.sum() - weight)
    jackknife = math.sqrt(199 / 200 * ((left_out - left_out.mean()) ** 2).sum())
    found = ratio(named(list(zip(part.tolist(), weight.tolist(), strict=True))))
    assert found.standard_error == pytest.approx(jackknife, rel=0.02)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=15))
def test_a_paired_difference_is_that_of_the_differences(values: list[tuple[float, float]]) -> None:
    one = named([(first, 1) for first, _ in values])
    other = named([(second, 1) for _, second in values])
    found = paired_difference(one, other)
    plain = ratio(named([(first - second, 1) for first, second in values]))
    assert found.value == pytest.approx(plain.value, abs=1e-9)
    assert found.standard_error == pytest.approx(plain.standard_error, abs=1e-9)


@given(pairs)
def test_a_model_differs_from_itself_by_nothing(values: list[tuple[float, float]]) -> None:
    found = paired_difference(named(values), named(values))
    assert found.value == 0
    assert found.standard_error == 0


def test_only_items_that_both_have_are_compared() -> None:
    one = {"a": (1.0, 1.0), "b": (5.0, 1.0), "c": (100.0, 1.0)}
    other = {"a": (0.0, 1.0), "b": (2.0, 1.0), "d": (-7.0, 1.0), "c": (3.0, 0.0)}
    found = paired_difference(one, other)
    assert (found.value, found.n) == (2.0, 2)


def test_nothing_is_never_zero() -> None:
    assert ratio({}).value is None
    assert ratio({"a": (0.0, 0.0)}).value is None
    assert ratio({"a": (0.0, 0.0)}).n == 0
    alone = ratio({"a": (3.0, 2.0)})
    assert (alone.value, alone.standard_error) == (1.5, None)
    assert paired_difference({"a": (1.0, 1.0)}, {"b": (1.0, 1.0)}).value is None
