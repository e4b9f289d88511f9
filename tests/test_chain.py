"""The gold token by the chain rule: products over source tokens by hand and in a double loop, and what they guarantee."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligning import Response, conversation, conversations, dense, gold_nll_of, map_of, prepared, sparse, toy
from cases import each
from fusechat.align.back_off import BackOff
from fusechat.align.candidates import NONE, Candidates, gather, remainders_inside
from fusechat.align.chain import following, with_own_token
from fusechat.align.counts import Seen, count_pairs
from fusechat.align.sequence import align_rows
from fusechat.align.spelling import Spelling
from fusechat.align.transfer import Transfer
from fusechat.align.vocabulary import VocabularyMap, build_map
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared

SOURCE = toy("a", "b", "c", "ab", "bc")
A, B, C, AB, BC, END = range(6)
WORDS = ["a", "b", "c", "ab", "bc", "abc", "aa", "ac", "ba", "bb", "ca", "cb", "cc"]
PIVOT = toy(*WORDS)


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


def products(pivot: Prepared, source: Prepared, nll: list[float]) -> list[float]:
    return following(align_rows(pivot, source), pivot, source, np.array(nll, dtype=np.float32)).tolist()


# -- the product of the tokens after the first --------------------------------------------------------------------------


@each("pivot, source, nll, expected", [
    # over several source tokens it is the product of all but the first
    (conversation(PIVOT, ids("abc", "ab"), ends=99), conversation(SOURCE, [A, B, C, A, B], ends=END),
     [1.0, 0.5, 0.25, 2.0, 0.125, 4.0], [np.exp(-0.75), np.exp(-0.125), np.nan]),
    # over one source token there is none, nor where a pivot token ends inside of one
    (conversation(PIVOT, ids("ab", "c")), conversation(SOURCE, [AB, C]), [1.0, 2.0], [np.nan, np.nan]),
    (conversation(PIVOT, ids("ab", "c")), conversation(SOURCE, [A, BC]), [1.0, 2.0], [np.nan, np.nan]),
    # one that starts inside a source token has that of those after it
    (conversation(PIVOT, ids("a", "bc", "a")), conversation(SOURCE, [AB, C, A]), [1.0, 0.5, 2.0], [np.nan, np.exp(-0.5), np.nan]),
    # each response has products of its own
    (conversation(PIVOT, ids("ab"), ids("ab"), ends=99), conversation(SOURCE, [A, B], [A, B], ends=END),
     [1, 0.5, 9, 1, 0.25, 9], [np.exp(-0.5), np.nan, np.exp(-0.25), np.nan]),
])  # fmt: skip
def test_products_by_hand(pivot: Prepared, source: Prepared, nll: list[float], expected: list[float]) -> None:
    assert products(pivot, source, nll) == pytest.approx(expected, nan_ok=True)


def test_rows_that_do_not_start_together_have_none() -> None:
    """Dynamic time warping may join such rows."""
    pivot, source = conversation(PIVOT, ids("a", "bc")), conversation(SOURCE, [A, B, C])
    alignment = align_rows(pivot, source, np.array([-1, 0]))
    assert np.isnan(following(alignment, pivot, source, np.ones(3, dtype=np.float32))).all()


def naive_following(pivot: Prepared, source: Prepared, nll: np.ndarray) -> list[float]:
    """The token that the pivot's starts with or inside of, and the one that ends where it does; all after the former up to it."""
    result = []
    for i in range(len(pivot)):
        found = float("nan")
        begin, end = max(int(pivot.begin[i]), 0), int(pivot.end[i])
        for j in range(len(source)):
            for last in range(j + 1, len(source)):
                rows = [j, last]
                here = all(source.response[row] == pivot.response[i] and not source.end_of_turn[row] for row in rows)
                wide = all(source.end[row] > max(source.begin[row], 0) for row in rows)
                around = max(source.begin[j], 0) <= begin < source.end[j]
                if here and wide and around and source.end[last] == end > begin and not pivot.end_of_turn[i]:
                    found = float(np.prod([np.exp(-float(nll[row])) for row in range(j + 1, last + 1)]))
        result.append(found)
    return result


@given(conversations(), st.integers(0, 1000))
def test_the_product_is_that_of_the_double_loop(sides: tuple[list[Response], list[Response]], seed: int) -> None:
    pivot, source = (prepared(responses) for responses in sides)
    nll = np.random.default_rng(seed).exponential(1.0, len(source)).astype(np.float32)
    found = following(align_rows(pivot, source), pivot, source, nll)
    assert found.tolist() == pytest.approx(naive_following(pivot, source, nll), nan_ok=True)


# -- the source's own token as a candidate ------------------------------------------------------------------------------


def with_own(
    pivot: Prepared, source: Prepared, captured: SparseDistribution, w: VocabularyMap, *, inside: bool = False
) -> Candidates:
    alignment = align_rows(pivot, source)
    rests = remainders_inside(alignment, source, captured, tokens=SOURCE, spelling=Spelling.of(SOURCE))
    before = gather(alignment, captured, w, [rests] if inside else [])
    return with_own_token(before, alignment, pivot, source, captured, w)


IDENTITY = map_of(np.eye(len(SOURCE) + 1), rests=[b"b"])


def test_a_gold_token_outside_of_the_kept_ones_has_its_mass_from_its_nll() -> None:
    pivot, source = conversation(PIVOT, ids("a", "b")), conversation(SOURCE, [A, B])
    captured = sparse([{B: 0.5, C: 0.25}, {B: 0.75}], k=2, nll=[3.0, -np.log(0.75)])
    found = with_own(pivot, source, captured, IDENTITY)
    assert found.row.tolist() == [[B, C, A], [NONE, NONE, B]]
    assert found.mass == pytest.approx(np.array([[0.5, 0.25, np.exp(-3.0)], [0, 0, 0.75]]))
    assert found.own.tolist() == [True, True]


def test_a_gold_token_among_the_kept_ones_moves_to_the_end_and_counts_once() -> None:
    pivot, source = conversation(PIVOT, ids("a")), conversation(SOURCE, [A])
    found = with_own(pivot, source, sparse([{A: 0.5, C: 0.25}], nll=[9.0]), IDENTITY)
    assert found.row.tolist() == [[NONE, C, A]]
    assert found.mass[0].tolist() == pytest.approx([0.0, 0.25, 0.5])


def test_inside_a_source_token_its_own_is_a_candidate_only_where_it_was_kept() -> None:
    pivot, source = conversation(PIVOT, ids("a", "b")), conversation(SOURCE, [AB])
    kept = with_own(pivot, source, sparse([{AB: 0.5, A: 0.5}], nll=[0.7]), IDENTITY, inside=True)
    assert kept.row[1].tolist() == [NONE, NONE, len(SOURCE)]
    assert kept.mass[1].tolist() == pytest.approx([0.0, 0.0, 0.5])  # the other half has nothing left
    lost = with_own(pivot, source, sparse([{C: 0.5, A: 0.5}], nll=[0.7]), IDENTITY, inside=True)
    assert lost.row[1].tolist() == [NONE] * 3
    assert lost.own.tolist() == [True, False]


def test_a_row_that_is_not_aligned_has_no_own_token() -> None:
    pivot, source = conversation(PIVOT, ids("a", "b"), ids("a")), conversation(SOURCE, [AB])
    found = with_own(pivot, source, sparse([{AB: 0.5, C: 0.25}], nll=[0.7]), IDENTITY)
    assert found.own.tolist() == [True, False, False]
    assert (found.row[1:] == NONE).all()


def test_an_end_of_turn_is_its_own_token_and_has_nothing_after_it() -> None:
    pivot, source = conversation(PIVOT, ids("a"), ends=99), conversation(SOURCE, [A], ends=END)
    found = with_own(pivot, source, sparse([{A: 0.5}, {A: 0.5}], nll=[0.7, 2.0]), IDENTITY)
    assert found.row[1].tolist() == [A, END]
    assert found.mass[1].tolist() == pytest.approx([0.5, np.exp(-2.0)])
    assert np.isnan(found.chained[1])


# -- what it guarantees -------------------------------------------------------------------------------------------------


def distribution(chance: np.random.Generator, size: int) -> dict[int, float]:
    return dict(enumerate(chance.dirichlet(np.full(size, 0.5)).clip(1e-6).tolist()))


@st.composite
def texts(draw: Any) -> tuple[Prepared, Prepared]:
    """A text in the pivot's words, some tokens of the source for it, and the same end of turn."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5))
    text, tokens = "".join(words), []
    while text:
        tokens.append(draw(st.sampled_from([token for token in range(END) if text.encode().startswith(SOURCE[token])])))
        text = text[len(SOURCE[tokens[-1]]) :]
    return conversation(PIVOT, ids(*words), ends=len(WORDS)), conversation(SOURCE, tokens, ends=END)


@given(texts(), st.integers(0, 1000), st.sampled_from([1, 3, len(WORDS)]), st.booleans())
def test_a_gold_token_over_whole_source_tokens_has_at_least_the_product_of_all(
    sides: tuple[Prepared, Prepared], seed: int, k: int, counted: bool
) -> None:
    """The source's full distributions; W counted on this very text or not at all; few pivot tokens kept."""
    pivot, source = sides
    chance = np.random.default_rng(seed)
    rows = [distribution(chance, len(SOURCE)) for _ in range(len(source))]
    captured = sparse(rows, nll=gold_nll_of(rows, source))
    alignment = align_rows(pivot, source)
    both = np.flatnonzero(alignment.unclipped & ~pivot.end_of_turn)
    pairs = [(source.gold[alignment.source_row[both]], pivot.gold[both])] if counted else []
    seen = Seen(pairs=count_pairs(pairs), tokens=np.arange(len(SOURCE)))
    w = build_map(seen, source=SOURCE, back_off=BackOff(PIVOT), roles={END: len(WORDS)})
    found = with_own(pivot, source, captured, w)
    result = Transfer(w, len(PIVOT))(found, pivot.gold, k=k)
    after = naive_following(pivot, source, captured.nll)
    for i in np.flatnonzero(alignment.source_row >= 0).tolist():
        if not np.isnan(after[i]):
            j, token = int(alignment.source_row[i]), int(pivot.gold[i])
            product = rows[j][int(source.gold[j])] * after[i]
            assert dense(result.rows, len(PIVOT))[i, token] >= product * (1 - 1e-6)
