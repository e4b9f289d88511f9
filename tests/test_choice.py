"""Which model teaches a group of rows: cross-entropy per byte or token, at all levels, weights and ties."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cases import each
from fusechat.data.distributions import SparseDistribution, nothing
from fusechat.fuse.teacher_selection import (
    Candidate,
    SelectionRule,
    common_responses,
    content_size,
    cross_entropies,
    cross_entropy,
    groups_of,
    position_cross_entropy,
    ties,
    weights,
)
from fusing import (
    LEVELS,
    UNITS,
    conversation_of_several,
    naive_cross_entropies,
    naive_groups,
    naive_weights,
    nll,
    prepared,
    sparse,
)

INF = math.inf


def candidate(responses: list[tuple[int, int]], *values: float, targets: SparseDistribution | None = None) -> Candidate:
    rows = prepared("a", responses)
    return Candidate(rows, nll(*values), nothing(len(rows)) if targets is None else targets)


# -- cross-entropies ----------------------------------------------------------------------------------------------------


def test_cross_entropy_is_nats_over_bytes_or_own_tokens_without_the_end_of_turn() -> None:
    one = candidate([(2, 10), (1, 6)], 1.5, 2.5, 100.0, 4.0, 100.0)
    for responses, unit, expected in (
        ([0], "byte", (1.5 + 2.5) / 10),
        ([1], "byte", 4.0 / 6),
        ([0, 1], "byte", (1.5 + 2.5 + 4.0) / 16),
        ([0], "token", (1.5 + 2.5) / 2),
        ([0, 1], "token", (1.5 + 2.5 + 4.0) / 3),
    ):
        assert cross_entropy(one, np.array(responses), unit) == pytest.approx(expected), (responses, unit)
    assert [content_size(one.rows, np.array([0, 1]), unit) for unit in UNITS] == [16, 3]
    bare = Candidate(
        prepared("a", [(2, 4)], ends_turn=False), nll(1.0, 2.0), nothing(2)
    )  # a template without end of turn
    assert [cross_entropy(bare, np.array([0]), unit) for unit in UNITS] == pytest.approx([3 / 4, 3 / 2])


def test_the_unit_decides_who_is_better() -> None:
    """The source needs twice the tokens for the same bytes: per token it looks better, per byte it is worse."""
    pivot = candidate([(2, 8)], 2.0, 2.0, 0.0)
    source = candidate([(4, 8)], 1.5, 1.5, 1.5, 1.5, 0.0)
    found = {unit: cross_entropies([pivot, source], pivot.rows, unit=unit, level="conversation") for unit in UNITS}
    assert found["byte"].tolist() == [[4 / 8], [6 / 8]]
    assert found["token"].tolist() == [[2.0], [1.5]]
    assert weights(found["byte"], "mince").tolist() == [[1.0], [0.0]]
    assert weights(found["token"], "mince").tolist() == [[0.0], [1.0]]


def test_many_small_terms_are_not_summed_in_half_or_single_precision() -> None:
    one = candidate([(5000, 5000)], *[1.0] * 4999, 1.25, 0.0)
    assert cross_entropy(one, np.array([0]), "byte") == pytest.approx(5000.25 / 5000, rel=1e-9)
    steps = candidate([(10001, 1)], 2.0**24, *[1.0] * 10000, 0.0)
    assert cross_entropy(steps, np.array([0]), "byte") == 2**24 + 10000


def test_of_a_conversation_only_responses_that_every_candidate_has_are_compared() -> None:
    three = candidate([(1, 1), (1, 2), (1, 4)], 1.0, 9.0, 2.0, 9.0, 50.0, 9.0)
    two = candidate([(2, 1), (1, 2)], 0.5, 1.0, 9.0, 3.0, 9.0)
    assert common_responses([three.rows, two.rows]).tolist() == [0, 1]
    by_byte = cross_entropies([three, two], three.rows, unit="byte", level="conversation")
    assert by_byte.tolist() == [[(1 + 2) / 3], [(0.5 + 1 + 3) / 3]]
    by_token = cross_entropies([three, two], three.rows, unit="token", level="conversation")
    assert by_token.tolist() == [[(1 + 2) / 2], [(0.5 + 1 + 3) / 3]]


def test_a_response_that_the_pivot_lost_counts_for_no_source_even_where_the_pivot_is_no_candidate() -> None:
    """The student has the pivot's responses: compared with it, a source is measured on these."""
    pivot = prepared("a", [(1, 2)])
    source = candidate([(1, 2), (1, 8)], 1.0, 0.0, 40.0, 0.0)
    assert cross_entropies([source], pivot, unit="byte", level="conversation").tolist() == [[1.0 / 2]]


def test_of_single_responses_a_candidate_without_one_has_nothing_to_say() -> None:
    pivot = candidate([(1, 1), (1, 2), (1, 4)], 1.0, 9.0, 2.0, 9.0, 6.0, 9.0)
    less = candidate([(2, 1), (1, 2)], 0.5, 1.0, 9.0, 3.0, 9.0)
    more = candidate([(1, 1)] * 4, 1.0, 9.0, 1.0, 9.0, 1.0, 9.0, 1.0, 9.0)
    by_byte = cross_entropies([pivot, less, more], pivot.rows, unit="byte", level="response")
    assert by_byte.tolist() == [[1, 1, 1.5], [1.5, 1.5, INF], [1, 1, 1]]
    by_token = cross_entropies([pivot, less, more], pivot.rows, unit="token", level="response")
    assert by_token.tolist() == [[1, 2, 6], [0.75, 3, INF], [1, 1, 1]]


def test_of_positions_the_stored_probability_of_the_gold_token_counts_with_a_floor() -> None:
    rows = [{5: 0.5, 9: 0.25}, {5: 0.5, 9: 0.25}, {9: 5e-5}, {}, {9: 1e-4}, {3: 1.0}]
    found = position_cross_entropy(sparse(rows), np.array([9, 7, 9, 9, 9, 3]))
    floor = -math.log(1e-4)
    assert found.tolist() == pytest.approx([-math.log(0.25), floor, floor, INF, floor, 0.0], abs=1e-6)


def test_of_positions_the_end_of_turn_is_one_and_units_and_nll_are_nothing() -> None:
    pivot = candidate([(1, 8)], 50.0, 50.0, targets=sparse([{7: 0.5}, {8: 0.125}]))  # gold: 7 and 8
    source = candidate([(3, 8)], 0.0, 0.0, 0.0, 0.0, targets=sparse([{7: 0.25}, {8: 1.0}]))
    for unit in UNITS:
        found = cross_entropies([pivot, source], pivot.rows, unit=unit, level="position")
        assert found.tolist() == [pytest.approx([math.log(2), math.log(8)]), pytest.approx([math.log(4), 0.0])]


def test_groups_are_all_rows_each_response_or_each_row() -> None:
    pivot = prepared("a", [(2, 1), (1, 1)])
    assert groups_of(pivot, "conversation").tolist() == [0] * 5
    assert groups_of(pivot, "response").tolist() == [0, 0, 0, 1, 1]
    assert groups_of(pivot, "position").tolist() == [0, 1, 2, 3, 4]


@given(conversation_of_several(3), st.sampled_from(UNITS), st.sampled_from(LEVELS), st.integers(1, 3), st.booleans())
def test_cross_entropies_are_those_of_plain_loops(
    several: list[Candidate], unit: str, level: str, number: int, with_pivot: bool
) -> None:
    assume(with_pivot or number < 3)
    pivot = several[0].rows
    chosen = several[:number] if with_pivot else several[1 : 1 + number]
    expected = naive_cross_entropies(chosen, pivot, SelectionRule(unit=unit, level=level))
    found = cross_entropies(chosen, pivot, unit=unit, level=level)
    assert groups_of(pivot, level).tolist() == naive_groups(pivot, level)
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6, atol=1e-6)


# -- weights and ties ---------------------------------------------------------------------------------------------------


@each("values, expected, tied", [
    ([0.5, 0.4], 1, 0), ([0.4, 0.5], 0, 0), ([0.4, 0.4], 0, 1), ([0.6, 0.4, 0.4], 1, 1), ([0.4, 0.5, 0.5], 0, 0),
    ([0.4, INF, 0.4], 0, 1), ([INF, 7.0, INF], 1, 0), ([0.3], 0, 0),
])  # fmt: skip
def test_the_lowest_has_all_and_of_equal_ones_the_first(values: list[float], expected: int, tied: int) -> None:
    found = np.array(values)[:, None]
    for function in ("mince", "source"):
        assert weights(found, function)[:, 0].tolist() == [float(index == expected) for index in range(len(values))]
    assert ties(found) == tied


def test_avgce_is_the_softmax_of_minus_the_cross_entropies() -> None:
    """By hand: exp(-ln 2) = 1/2 and exp(-ln 6) = 1/6 give 3/4 and 1/4; a third that says nothing changes nothing. What is very
    unlikely does not underflow."""
    found = weights(np.array([[math.log(2), 3.0], [math.log(6), 3.0], [INF, 3.0]]), "avgce")
    assert found[:, 0].tolist() == [pytest.approx(3 / 4), pytest.approx(1 / 4), 0.0]
    assert found[:, 1].tolist() == pytest.approx([1 / 3] * 3)
    found = weights(np.array([[2000.0], [2000.0 + math.log(3)]]), "avgce")
    assert found[:, 0].tolist() == pytest.approx([3 / 4, 1 / 4])


def test_a_group_that_nobody_speaks_of_has_no_weights_and_is_no_tie() -> None:
    found = np.array([[INF, 1.0], [INF, 2.0]])
    for function in ("mince", "avgce", "source"):
        assert weights(found, function)[:, 0].tolist() == [0.0, 0.0], function
        assert weights(found, function)[:, 1].sum() == pytest.approx(1.0)
    assert ties(found) == 0
    assert ties(np.array([[1.0, 2.0, INF, 3.0], [1.0, 1.0, INF, 3.0], [5.0, 1.0, INF, INF]])) == 3, "counted by group"


values = st.one_of(st.sampled_from([0.0, 0.5, 1.0, INF]), st.floats(0.0, 15.0))


@given(
    st.integers(1, 4).flatmap(lambda g: st.lists(st.lists(values, min_size=g, max_size=g), min_size=1, max_size=4)),
    st.sampled_from(["mince", "avgce", "source"]),
)
def test_weights_are_those_of_plain_loops_and_sum_to_one(found: list[list[float]], function: str) -> None:
    share = weights(np.array(found), function)
    np.testing.assert_allclose(share, np.array(naive_weights(found, function)), atol=1e-12)
    spoken = [min(group) < INF for group in zip(*found, strict=True)]
    np.testing.assert_allclose(share.sum(axis=0), np.array(spoken, dtype=float), atol=1e-12)


@each("rule, pivot, student", [
    (SelectionRule(), True, False),
    (SelectionRule(function="avgce", against="student"), False, True),
    (SelectionRule(function="source"), False, False),
    (SelectionRule(function="source", against="student"), False, False),
])  # fmt: skip
def test_with_whom_sources_are_compared(rule: SelectionRule, pivot: bool, student: bool) -> None:
    assert (rule.compares_with_pivot, rule.compares_with_student) == (pivot, student)
