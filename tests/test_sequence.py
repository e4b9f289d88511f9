"""Alignment by byte boundaries, and what starts inside a source token, against double loops over all pairs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aligning import Response, Spans, array, conversations, prepared, tilings
from fusechat.align import align_starts
from fusechat.align.sequence import Alignment, align_rows, containing
from fusechat.data.prepared import Prepared


def pairs_of_tilings() -> st.SearchStrategy[tuple[Spans, Spans]]:
    return st.integers(0, 14).flatmap(lambda size: st.tuples(tilings(size), tilings(size)))


def naive_starts(pivot: Spans, source: Spans) -> list[int]:
    """The first source token with width that starts where a pivot token with width does."""
    result = []
    for begin, end in pivot:
        found = [j for j, (other, other_end) in enumerate(source) if other == begin and other_end > other]
        result.append(found[0] if found and end > begin else -1)
    return result


@given(pairs_of_tilings())
def test_align_starts_is_the_double_loop(pair: tuple[Spans, Spans]) -> None:
    pivot, source = pair
    found = align_starts(array(pivot), array(source))
    assert found.dtype == np.int64
    assert found.tolist() == naive_starts(pivot, source)


@given(pairs_of_tilings())
def test_alignment_is_symmetric_and_monotone(pair: tuple[Spans, Spans]) -> None:
    pivot, source = pair
    there = align_starts(array(pivot), array(source))
    back = align_starts(array(source), array(pivot))
    forward = {(i, j) for i, j in enumerate(there.tolist()) if j >= 0}
    assert forward == {(i, j) for j, i in enumerate(back.tolist()) if i >= 0}
    assert (np.diff(there[there >= 0]) > 0).all()


def test_starts_by_hand() -> None:
    """By the ends of the surfaces of `banana`, the wrong `na` would do as well; a dummy prefix corresponds to nothing."""
    for pivot, source, expected in (
        ([(0, 2), (2, 3), (3, 7)], [(0, 2), (2, 3), (3, 7)], [0, 1, 2]),
        ([(0, 6)], [(0, 2), (2, 4), (4, 6)], [0]),
        ([(0, 2), (2, 4), (4, 6)], [(0, 6)], [0, -1, -1]),
        ([(0, 0), (0, 3)], [(0, 0), (0, 3)], [-1, 1]),
        ([(0, 3)], [(0, 0)], [-1]),
        ([], [(0, 1)], []),
        ([(0, 1)], [], [-1]),
    ):
        assert align_starts(array(pivot), array(source)).tolist() == expected, (pivot, source)
    assert align_starts([(0, 1), (1, 2)], [(0, 2)]).tolist() == [0, -1]  # type: ignore[arg-type]


def naive_containing(pivot: Spans, source: Spans) -> list[int]:
    """The source token that a pivot token with width begins in, where no source token with width begins."""
    result = []
    for begin, end in pivot:
        inside = [j for j, (first, last) in enumerate(source) if first < begin < last]
        begins_one = any(first == begin and last > first for first, last in source)
        result.append(inside[0] if inside and end > begin and not begins_one else -1)
    return result


@given(pairs_of_tilings())
def test_containing_is_the_double_loop(pair: tuple[Spans, Spans]) -> None:
    found = containing(array(pair[0]), array(pair[1]))
    assert found.dtype == np.int64
    assert found.tolist() == naive_containing(*pair)


@given(st.integers(1, 14).flatmap(lambda size: st.tuples(tilings(size), tilings(size))))
def test_of_one_text_every_token_with_width_starts_with_a_source_token_or_inside_one(pair: tuple[Spans, Spans]) -> None:
    starts, inside = (find(array(pair[0]), array(pair[1])) >= 0 for find in (align_starts, containing))
    assert (starts ^ inside).tolist() == [end > begin for begin, end in pair[0]]


def test_what_contains_by_hand() -> None:
    """A token that starts with a source token is inside none, though another continues: character offsets may overlap."""
    assert containing(array([(2, 3), (3, 4)]), array([(0, 4), (2, 4)])).tolist() == [-1, 1]
    assert containing(array([]), array([(0, 3)])).tolist() == []
    assert containing(array([(1, 2)]), array([])).tolist() == [-1]
    assert containing(array([(1, 2)]), array([(1, 1)])).tolist() == [-1]


# -- rows of conversations ----------------------------------------------------------------------------------------------


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


def naive_inside(pivot: Prepared, source: Prepared) -> list[tuple[int, int]]:
    """The source's row whose token a pivot's content token starts inside of, and how many of its bytes come before."""
    starts = naive_rows(pivot, source)
    result = []
    for i in range(len(pivot)):
        found = (-1, 0)
        first, last = max(int(pivot.begin[i]), 0), int(pivot.end[i])
        for j in range(len(source)):
            same = pivot.response[i] == source.response[j] and not (pivot.end_of_turn[i] or source.end_of_turn[j])
            if starts[i] < 0 and same and last > first and max(source.begin[j], 0) < first < source.end[j]:
                found = (j, first - int(source.begin[j]))
        result.append(found)
    return result


@given(conversations())
def test_rows_inside_and_bytes_given_are_the_double_loop(sides: tuple[list[Response], list[Response]]) -> None:
    pivot, source = (prepared(responses) for responses in sides)
    alignment = align_rows(pivot, source)
    expected = naive_inside(pivot, source)
    assert list(zip(alignment.inside_row.tolist(), alignment.given.tolist(), strict=True)) == expected
    assert alignment.inside.tolist() == [row >= 0 for row, _ in expected]


def test_bytes_given_count_what_the_source_token_takes_in_of_the_template() -> None:
    """The source's `▁hello` takes the template's space; the pivot's `llo` starts two bytes into the content."""
    alignment = align_rows(prepared([([(0, 2), (2, 5)], False)]), prepared([([(-1, 5)], False)]))
    assert alignment.source_row.tolist() == [0, -1]
    assert alignment.source_clip.tolist() == [1, 0]
    assert alignment.inside_row.tolist() == [-1, 0]
    assert alignment.given.tolist() == [0, 3]


def test_a_pivot_token_without_width_is_inside_nothing() -> None:
    alignment = align_rows(prepared([([(0, 2), (2, 2), (2, 4)], False)]), prepared([([(0, 4)], False)]))
    assert alignment.inside_row.tolist() == [-1, -1, 0]


def rows(name: str, alignment: Alignment) -> list[int]:
    return list(getattr(alignment, name).tolist())


def test_rows_of_ones_own_take_the_place_of_shared_starts() -> None:
    """`banana` against `ba|na|na`: a correspondence that joins the last `na` leaves the first one without."""
    pivot, source = prepared([([(0, 2), (2, 4), (4, 6)], True)]), prepared([([(-1, 6)], True)])
    own = np.array([-1, -1, 0, 1])
    alignment = align_rows(pivot, source, own)
    assert rows("source_row", alignment) == [-1, -1, 0, 1]
    assert rows("source_clip", alignment) == [0, 0, 1, 0]
    # The first starts with the source's token, so that it is inside none; the second is inside it, one byte of template before.
    assert rows("inside_row", alignment) == [-1, 0, -1, -1]
    assert rows("given", alignment) == [0, 3, 0, 0]


def test_ends_of_turn_join_once_a_response_and_with_nothing_else() -> None:
    pivot = prepared([([(0, 2), (2, 4)], True), ([(0, 3)], True)])
    source = prepared([([(0, 4)], True), ([(0, 1), (1, 3)], True)])
    assert rows("source_row", align_rows(pivot, source)) == [0, -1, 1, 2, 4]
    pivot, source = prepared([([(0, 2)], True)]), prepared([([(0, 2)], False)])  # one without partner is inside nothing
    assert rows("source_row", align_rows(pivot, source)) == [0, -1]
    assert rows("inside_row", align_rows(pivot, source)) == [-1, -1]
    # although the contents end at other bytes: one model's template stripped the end of the content
    assert rows("source_row", align_rows(prepared([([(0, 4)], True)]), prepared([([(0, 3)], True)]))) == [0, 1]


def test_a_response_that_one_model_lost_is_unaligned_for_it() -> None:
    both, one = prepared([([(0, 2)], True), ([(0, 2)], True)]), prepared([([(0, 2)], True)])
    assert rows("source_row", align_rows(both, one)) == [0, 1, -1, -1]
    assert rows("source_row", align_rows(one, both)) == [0, 1]
