"""Looking one source token ahead: which tokens are open, where it is done, and what becomes of the mass. By hand, and by laws."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligning import conversation, dense, map_of, sparse, toy
from fusechat.align.candidates import NONE, Candidates, gather, remainders_inside
from fusechat.align.counts import Counts
from fusechat.align.lookahead import (
    MIN_CONTINUATION,
    Ahead,
    bytes_ahead,
    extendable_tokens,
    next_candidates,
    rows_ahead,
    with_ahead,
)
from fusechat.align.sequence import align_rows
from fusechat.align.spelling import Spelling
from fusechat.align.transfer import Transfer
from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared

SOURCE = toy("a", "b", "c", "ab")
A, B, C, AB, END = range(5)
PIVOT = toy("a", "b", "c", "ab", "ac", "abc", "bc")
OPEN = np.array([True, False, False, False, False])


def counts(table: dict[tuple[int, int], int]) -> Counts:
    return Counts(
        np.array([s for s, _ in sorted(table)], dtype=np.int64),
        np.array([t for _, t in sorted(table)], dtype=np.int64),
        np.array([table[pair] for pair in sorted(table)], dtype=np.int64),
    )


def rests_for(rows: list[bytes]) -> VocabularyMap:
    """The identity for source tokens, and for each of these bytes a row of its own: pivot token `len(SOURCE) + its index`."""
    size = len(SOURCE) + len(rows)
    return map_of(np.eye(size), rests=rows)


# -- open tokens --------------------------------------------------------------------------------------------------------


def test_a_token_is_open_where_a_hundredth_of_its_counts_is_with_longer_tokens() -> None:
    """`a` once in a hundred, `b` once in a hundred and one, `c` never, `ab` with its equal, a shorter one and a longer one. Several
    longer tokens open one together; those that were never counted are open."""
    seen = {(A, 0): 99, (A, 3): 1, (B, 1): 100, (B, 6): 1, (C, 2): 7, (AB, 3): 4, (AB, 0): 5, (AB, 5): 1}
    assert extendable_tokens(counts(seen), PIVOT, SOURCE)[:END].tolist() == [True, False, False, True]
    assert extendable_tokens(counts({(A, 0): 198, (A, 3): 1, (A, 5): 1}), PIVOT, SOURCE)[A]
    assert not extendable_tokens(counts({(A, 0): 199, (A, 3): 1}), PIVOT, SOURCE)[A]
    assert extendable_tokens(counts({}), PIVOT, SOURCE).tolist() == [True] * len(SOURCE)
    assert extendable_tokens(counts({(B, 1): 3}), PIVOT, SOURCE).tolist() == [True, False, True, True, True]
    # in a model's padding a pivot's is longer than nothing, and whatever has a length is longer than a source's
    found = extendable_tokens(counts({(A, len(PIVOT) + 3): 5, (len(SOURCE) + 2, 0): 1}), PIVOT, SOURCE)
    assert found.tolist() == [False, True, True, True, True, True, True, True]


# -- where to look ahead ------------------------------------------------------------------------------------------------


def ahead_of(pivot: Prepared, source: Prepared, is_open: np.ndarray = OPEN, *, inside: bool = False) -> Ahead:
    return rows_ahead(align_rows(pivot, source), source, is_open, SOURCE, inside=inside)


def rows(ahead: Ahead) -> list[tuple[int, int, bytes]]:
    return list(zip(ahead.pivot_row.tolist(), ahead.source_row.tolist(), ahead.rest, strict=True))


def test_rows_that_start_with_an_open_token_are_looked_ahead() -> None:
    pivot, source = conversation(PIVOT, [3, 2, 0, 1], ends=7), conversation(SOURCE, [A, B, C, A, B], ends=END)
    assert rows(ahead_of(pivot, source)) == [(0, 0, b"a"), (2, 3, b"a")]
    assert rows(ahead_of(pivot, source, np.zeros(5, dtype=bool))) == []


def test_a_row_inside_a_source_token_has_what_is_left_of_it() -> None:
    pivot, source = conversation(PIVOT, [0, 6]), conversation(SOURCE, [AB, C])
    assert rows(ahead_of(pivot, source, inside=True)) == [(1, 0, b"b")]
    assert rows(ahead_of(pivot, source)) == []


def test_there_is_no_look_ahead_past_the_end_of_a_response() -> None:
    """With an end of turn that is what comes next, and after it nothing."""
    pivot, source = conversation(PIVOT, [0], [0]), conversation(SOURCE, [A], [A])
    assert rows(ahead_of(pivot, source)) == []
    pivot, source = conversation(PIVOT, [0], [0], ends=7), conversation(SOURCE, [A], [A], ends=END)
    assert rows(ahead_of(pivot, source)) == [(0, 0, b"a"), (2, 2, b"a")]
    assert rows(ahead_of(pivot, source, np.ones(5, dtype=bool))) == [(0, 0, b"a"), (2, 2, b"a")]


def test_a_token_that_takes_in_template_text_or_is_in_the_models_padding_is_not_looked_ahead() -> None:
    every = np.ones(5, dtype=bool)
    assert rows(ahead_of(conversation(PIVOT, [6]), conversation(SOURCE, [AB, C], taken=[1]), every)) == []
    pivot, source = conversation(PIVOT, [0, 1]), conversation(SOURCE, [A, B])
    source.input_ids[source.position[0]] = 77
    assert rows(ahead_of(pivot, source, every)) == []


def test_bytes_ahead_end_with_the_rest_where_a_special_token_comes_and_pads_have_none() -> None:
    ahead = Ahead(np.array([0, 1, 2]), np.array([0, 1, 2]), [b"x", b"yz", b"x"])
    different, which = bytes_ahead(ahead, np.array([[A, AB, END], [C, -1, END], [-1, A, AB]]), SOURCE)
    found = [[different[at] if at >= 0 else None for at in row] for row in which.tolist()]
    assert found == [[b"xa", b"xab", b"x"], [b"yzc", None, b"yz"], [None, b"xa", b"xab"]]
    for n in (0, 1):
        ahead = Ahead(np.arange(n), np.arange(n), [b"x"] * n)
        different, which = bytes_ahead(ahead, np.full((n, 2), -1, dtype=np.int32), SOURCE)
        assert (different, which.tolist()) == ([], [[-1, -1]] * n)


def test_the_next_candidates_are_those_of_the_row_after_but_for_faint_ones() -> None:
    captured = sparse([{A: 0.75}, {B: 0.5, C: MIN_CONTINUATION / 2}, {C: 1.0}], k=3)
    ids, share = next_candidates(Ahead(np.array([0, 1]), np.array([0, 1]), [b"a", b"b"]), captured)
    assert ids.tolist() == [[B, -1, -1], [C, -1, -1]]
    assert share == pytest.approx(np.array([[0.5, 0, 0], [1.0, 0, 0]]))


# -- what becomes of the mass -------------------------------------------------------------------------------------------


def looked_ahead(
    pivot: Prepared, source: Prepared, captured: SparseDistribution, w: VocabularyMap, *, inside: bool = False
) -> tuple[Candidates, Candidates]:
    """The candidates before and after."""
    alignment = align_rows(pivot, source)
    rests = remainders_inside(alignment, source, captured, tokens=SOURCE, spelling=Spelling.of(SOURCE))
    before = gather(alignment, captured, w, [rests] if inside else [])
    ahead = rows_ahead(alignment, source, OPEN, SOURCE, inside=inside)
    return before, with_ahead(before, ahead, source, captured, w, SOURCE)


def mass_by_row(candidates: Candidates, i: int, size: int) -> dict[int, float]:
    result = np.zeros(size + 1)
    np.add.at(result, candidates.row[i], candidates.mass[i])  # no row, -1, is the last
    return {row: mass for row, mass in enumerate(result.tolist()) if mass}


def test_the_own_tokens_mass_is_spread_over_what_comes_next_and_the_tails_share_stays() -> None:
    """The text is `ab`. The source says `a` with 0.6 and then `b` with 0.5, `c` with 0.25, its end with 0.125: a tail of 0.125."""
    pivot, source = conversation(PIVOT, [3]), conversation(SOURCE, [A, B])
    captured = sparse([{A: 0.6, B: 0.3}, {B: 0.5, C: 0.25, END: 0.125}], k=3)
    w = rests_for([b"a", b"ab", b"ac"])
    _, after = looked_ahead(pivot, source, captured, w)
    expected = {B: 0.3, 6: 0.6 * 0.5, 7: 0.6 * 0.25, 5: 0.6 * 0.125, A: 0.6 * 0.125}
    assert mass_by_row(after, 0, 8) == pytest.approx(expected)


def test_faint_continuations_stay_with_the_own_token() -> None:
    pivot, source = conversation(PIVOT, [3]), conversation(SOURCE, [A, B])
    captured = sparse([{A: 0.5}, {B: 0.75, C: MIN_CONTINUATION / 2}], k=2)
    _, after = looked_ahead(pivot, source, captured, rests_for([b"ab"]))  # which has no row for `ac`
    assert mass_by_row(after, 0, 6) == pytest.approx({5: 0.375, A: 0.125})


def test_the_pivots_tokens_get_what_their_bytes_say() -> None:
    """Through W as counted: bytes `ab` were the pivot's `ab` three times of four, else its `abc`; a lone `a` was `a` or `ac`."""
    pivot, source = conversation(PIVOT, [3]), conversation(SOURCE, [A, B])
    captured = sparse([{A: 0.5, B: 0.25}, {B: 0.75}], k=2)
    matrix = np.zeros((len(SOURCE) + 1, len(PIVOT)))
    matrix[A, [0, 4]], matrix[B, 1], matrix[-1, [3, 5]] = 0.5, 1.0, (0.75, 0.25)
    w = map_of(matrix, rests=[b"ab"])
    _, after = looked_ahead(pivot, source, captured, w)
    found = dense(Transfer(w, len(PIVOT))(after, pivot.gold, k=7).rows, len(PIVOT))
    ahead, tail = 0.5 * 0.75, 0.5 * 0.25
    expected = [tail / 2, 0.25, 0, ahead * 0.75, tail / 2, ahead * 0.25, 0, 0]
    assert found[0] == pytest.approx(np.array(expected))


def test_inside_a_source_token_the_own_token_goes_on_as_well() -> None:
    """The pivot's `bc` starts inside `ab`: given `a`, the candidates `ab` and `a` are left, 0.4 and 0.1 of them."""
    pivot, source = conversation(PIVOT, [0, 6]), conversation(SOURCE, [AB, C])
    captured = sparse([{AB: 0.4, B: 0.3, A: 0.1}, {C: 0.75, A: 0.125}], k=3)
    w = rests_for([b"b", b"ba", b"bc"])
    before, after = looked_ahead(pivot, source, captured, w, inside=True)
    assert mass_by_row(before, 1, 8) == pytest.approx({5: 0.8})
    assert mass_by_row(after, 1, 8) == pytest.approx({7: 0.8 * 0.75, 6: 0.8 * 0.125, 5: 0.8 * 0.125})


def test_where_the_own_token_was_not_kept_or_the_chain_rule_says_more_nothing_changes() -> None:
    pivot, source, w = conversation(PIVOT, [3]), conversation(SOURCE, [A, B]), rests_for([b"ab"])
    before, after = looked_ahead(pivot, source, sparse([{B: 0.5, C: 0.25}, {B: 0.75}], k=2), w)
    assert mass_by_row(after, 0, 6) == mass_by_row(before, 0, 6) == pytest.approx({B: 0.5, C: 0.25})
    captured, alignment = sparse([{A: 0.5, B: 0.25}, {B: 0.75}], k=2), align_rows(pivot, source)
    chained = gather(alignment, captured, w, [])
    chained = Candidates(chained.row, chained.mass, np.array([True]), np.array([0.75]))
    ahead = rows_ahead(alignment, source, OPEN, SOURCE, inside=False)
    after = with_ahead(chained, ahead, source, captured, w, SOURCE)
    assert mass_by_row(after, 0, 6) == pytest.approx({A: 0.5, B: 0.25})


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(st.lists(TOKENS, min_size=1, max_size=2), st.booleans(), st.data())
def test_the_total_mass_of_every_row_is_what_it_was(responses: list[list[int]], ends: bool, data: Any) -> None:
    """The pivot has single letters, so that it starts with source tokens and inside them."""
    source = conversation(SOURCE, *responses, ends=END if ends else None)
    letters = [[b"abc".index(byte) for token in response for byte in SOURCE[token]] for response in responses]
    pivot = conversation(PIVOT, *letters, ends=7 if ends else None)
    captured = sparse(
        [
            {token: share / 64 for token, share in enumerate(data.draw(st.lists(st.integers(1, 12), max_size=5)))}
            for _ in range(len(source))
        ],
        k=5,
    )
    rests = sorted({start + end for start in (b"a", b"b", b"") for end in (b"", b"a", b"b", b"c", b"ab")} - {b""})
    before, after = looked_ahead(pivot, source, captured, rests_for(rests), inside=True)
    assert after.mass.sum(axis=1) == pytest.approx(before.mass.sum(axis=1))
    assert (after.mass >= 0).all()
    assert ((after.row != NONE) | (after.mass == 0))[:, : captured.ids.shape[1]].all()
