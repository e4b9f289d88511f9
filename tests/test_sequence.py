"""Alignment by byte boundaries against a double loop over all pairs."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align import align_starts
from fusechat.align.sequence import align_rows
from fusechat.core.prepared import Prepared

FEW = settings(max_examples=150, deadline=None)


@st.composite
def tilings(draw: Callable, size: int, zero_width: bool = True) -> list[tuple[int, int]]:
    """Spans that tile `size` bytes, some of them empty."""
    cuts = draw(st.sets(st.integers(1, size - 1))) if size > 1 else set()
    edges = [0, *sorted(cuts), size] if size else [0]
    spans = []
    for begin, end in itertools.pairwise(edges):
        spans += [(begin, begin)] * (draw(st.integers(0, 2)) if zero_width else 0)
        spans.append((begin, end))
    return spans + [(size, size)] * (draw(st.integers(0, 1)) if zero_width else 0)


def pairs_of_tilings() -> st.SearchStrategy[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    return st.integers(0, 14).flatmap(lambda size: st.tuples(tilings(size), tilings(size)))


def naive_starts(pivot: list[tuple[int, int]], source: list[tuple[int, int]]) -> list[int]:
    """The first source token with width that starts where a pivot token with width does."""
    result = []
    for begin, end in pivot:
        found = [j for j, (other, other_end) in enumerate(source) if other == begin and other_end > other]
        result.append(found[0] if found and end > begin else -1)
    return result


def array(spans: list[tuple[int, int]]) -> np.ndarray:
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


@FEW
@given(pairs_of_tilings())
def test_align_starts_is_the_double_loop(pair: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    pivot, source = pair
    found = align_starts(array(pivot), array(source))
    assert found.dtype == np.int64
    assert found.tolist() == naive_starts(pivot, source)


@FEW
@given(pairs_of_tilings())
def test_alignment_is_symmetric_and_monotone(pair: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    pivot, source = pair
    there = align_starts(array(pivot), array(source))
    back = align_starts(array(source), array(pivot))
    forward = {(i, j) for i, j in enumerate(there.tolist()) if j >= 0}
    assert forward == {(i, j) for j, i in enumerate(back.tolist()) if i >= 0}
    assert (np.diff(there[there >= 0]) > 0).all()


def test_a_tiling_against_itself_is_the_identity() -> None:
    spans = array([(0, 2), (2, 3), (3, 7)])
    assert align_starts(spans, spans).tolist() == [0, 1, 2]


def test_banana_has_one_start_in_common_with_itself_in_three_pieces() -> None:
    """By the ends of the surfaces, the wrong `na` would do as well."""
    assert align_starts(array([(0, 6)]), array([(0, 2), (2, 4), (4, 6)])).tolist() == [0]
    assert align_starts(array([(0, 2), (2, 4), (4, 6)]), array([(0, 6)])).tolist() == [0, -1, -1]


def test_a_dummy_prefix_corresponds_to_nothing() -> None:
    assert align_starts(array([(0, 0), (0, 3)]), array([(0, 0), (0, 3)])).tolist() == [-1, 1]
    assert align_starts(array([(0, 3)]), array([(0, 0)])).tolist() == [-1]


def test_no_tokens_at_all() -> None:
    assert align_starts(array([]), array([(0, 1)])).tolist() == []
    assert align_starts(array([(0, 1)]), array([])).tolist() == [-1]


def test_lists_are_taken_as_well_as_arrays() -> None:
    assert align_starts([(0, 1), (1, 2)], [(0, 2)]).tolist() == [0, -1]  # type: ignore[arg-type]


# -- rows of conversations ----------------------------------------------------------------------------------------------

Response = tuple[list[tuple[int, int]], bool]  # spans of its content tokens, and whether an end of turn follows


def prepared(responses: list[Response]) -> Prepared:
    response, begin, end, closing, sizes = [], [], [], [], []
    for number, (spans, ends_turn) in enumerate(responses):
        sizes.append(spans[-1][1])
        for first, last in [*spans, *([(sizes[-1], sizes[-1])] if ends_turn else [])]:
            response.append(number)
            begin.append(first)
            end.append(last)
        closing += [False] * len(spans) + [True] * ends_turn
    n = len(response)
    return Prepared(
        id="x",
        input_ids=np.arange(n + 1, dtype=np.int32),
        position=np.arange(1, n + 1, dtype=np.int32),
        response=np.array(response, dtype=np.int32),
        begin=np.array(begin, dtype=np.int32),
        end=np.array(end, dtype=np.int32),
        end_of_turn=np.array(closing, dtype=bool),
        content_bytes=np.array(sizes, dtype=np.int32),
    )


def naive_rows(pivot: Prepared, source: Prepared) -> list[int]:
    result = []
    for i in range(len(pivot)):
        found = -1
        for j in range(len(source)):
            if pivot.response[i] != source.response[j] or pivot.end_of_turn[i] != source.end_of_turn[j]:
                continue
            wide = pivot.end[i] > max(pivot.begin[i], 0) and source.end[j] > max(source.begin[j], 0)
            starts_together = max(pivot.begin[i], 0) == max(source.begin[j], 0)
            if pivot.end_of_turn[i] or (wide and starts_together):
                found = j
                break
        result.append(found)
    return result


@st.composite
def conversations(draw: Callable) -> tuple[list[Response], list[Response]]:
    """One conversation as two models see it: either may clip its first token, lose later responses, end no turns."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    sides = []
    for _ in range(2):
        kept = draw(st.integers(1, len(sizes)))
        ends_turn = draw(st.booleans())
        responses: list[Response] = []
        for size in sizes[:kept]:
            spans = draw(tilings(size))
            if draw(st.booleans()):
                spans = [(begin, end) for begin, end in spans if end > begin]
                spans[0] = (-draw(st.integers(1, 2)), spans[0][1])
            responses.append((spans, ends_turn))
        sides.append(responses)
    return sides[0], sides[1]


@FEW
@given(conversations())
def test_align_rows_is_the_double_loop(sides: tuple[list[Response], list[Response]]) -> None:
    pivot, source = (prepared(responses) for responses in sides)
    alignment = align_rows(pivot, source)
    expected = naive_rows(pivot, source)
    assert alignment.source_row.tolist() == expected
    assert alignment.pivot_clip.tolist() == [max(0, -begin) for begin in pivot.begin.tolist()]
    assert alignment.source_clip.tolist() == [max(0, -int(source.begin[j])) if j >= 0 else 0 for j in expected]
    assert alignment.unclipped.tolist() == [
        j >= 0 and pivot.begin[i] >= 0 and source.begin[j] >= 0 for i, j in enumerate(expected)
    ]


def test_ends_of_turn_join_once_a_response_and_with_nothing_else() -> None:
    pivot = prepared([([(0, 2), (2, 4)], True), ([(0, 3)], True)])
    source = prepared([([(0, 4)], True), ([(0, 1), (1, 3)], True)])
    assert align_rows(pivot, source).source_row.tolist() == [0, -1, 1, 2, 4]


def test_an_end_of_turn_is_joined_although_the_contents_end_at_other_bytes() -> None:
    """One model's template stripped the end of the content."""
    assert align_rows(prepared([([(0, 4)], True)]), prepared([([(0, 3)], True)])).source_row.tolist() == [0, 1]


@pytest.mark.parametrize("lost_by", ["pivot", "source"])
def test_a_response_that_one_model_lost_is_unaligned_for_it(lost_by: str) -> None:
    both, one = prepared([([(0, 2)], True), ([(0, 2)], True)]), prepared([([(0, 2)], True)])
    if lost_by == "source":
        assert align_rows(both, one).source_row.tolist() == [0, 1, -1, -1]
    else:
        assert align_rows(one, both).source_row.tolist() == [0, 1]
