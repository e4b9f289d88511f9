"""How good an alignment is: gold tokens under stored rows, segments against a naive cutting, and sums by hand."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from aligning import Response, conversation, conversations, gold_nll_of, prepared, sparse, toy
from cases import each
from fusechat.align.aligner import Aligner, Pair, Side, Strategy, Survey, covered
from fusechat.align.back_off import EDIT, SEEN, BackOff
from fusechat.align.quality import Quality, covered_segments, gold_nll
from fusechat.align.stats import AlignmentStats, add_figures
from fusechat.data.conversations import Conversation, Message
from fusechat.data.prepared import Prepared
from fusechat.models.templates import ChatTemplate
from fusechat.models.token_bytes import TokenBytes
from fusechat.models.tokenise import prepare_conversation

LN2 = float(np.log(2))


# -- gold tokens --------------------------------------------------------------------------------------------------------


def test_gold_tokens_have_their_stored_probability_and_those_outside_the_floor() -> None:
    """So has one whose stored probability is below it; a pad is no gold token."""
    rows = sparse([{3: 0.5, 4: 0.25}, {3: 0.5, 4: 0.25}, {4: 0.75}, {}], k=2)
    found = gold_nll(rows, np.array([4, 7, 0, 5]))
    assert found == pytest.approx([np.log(4), np.log(1e4), np.log(1e4), np.log(1e4)])
    assert gold_nll(sparse([{3: 1e-6}]), np.array([3])) == pytest.approx([np.log(1e4)])
    assert gold_nll(sparse([{}], k=1), np.array([-1])) == pytest.approx([np.log(1e4)])


# -- segments -----------------------------------------------------------------------------------------------------------


def naive_segments(pivot: Prepared, source: Prepared, which: list[bool]) -> tuple[list[bool], list[bool]]:
    """Responses cut where both models start a token with width; of each piece both sides, where all of the pivot's is covered."""
    ours, theirs = [False] * len(pivot), [False] * len(source)

    def rows(side: Prepared, response: int, *, wide: bool) -> dict[int, int]:
        """Row → first byte."""
        return {
            row: max(int(side.begin[row]), 0)
            for row in range(len(side))
            if side.response[row] == response and not side.end_of_turn[row]
            if not wide or side.end[row] > max(side.begin[row], 0)
        }

    for response in {*pivot.response.tolist()} & {*source.response.tolist()}:
        own, other = rows(pivot, response, wide=True), rows(source, response, wide=True)
        cuts = [*sorted({*own.values()} & {*other.values()}), np.inf]
        for first, last in itertools.pairwise(cuts):
            piece = [row for row, begin in own.items() if first <= begin < last]
            if all(which[row] for row in piece):
                for row in piece:
                    ours[row] = True
                for row, begin in rows(source, response, wide=False).items():
                    theirs[row] = theirs[row] or first <= begin < last
    return ours, theirs


def segments(pivot: Prepared, source: Prepared, which: list[bool]) -> tuple[list[bool], list[bool]]:
    ours, theirs = covered_segments(pivot, source, np.array(which, dtype=bool))
    return ours.tolist(), theirs.tolist()


@given(conversations(lost=False), st.integers(0, 1000), st.sampled_from([0.5, 0.8, 1.0]))
def test_segments_are_those_of_the_naive_cutting(
    sides: tuple[list[Response], list[Response]], seed: int, share: float
) -> None:
    pivot, source = (prepared(responses) for responses in sides)
    which = (np.random.default_rng(seed).random(len(pivot)) < share).tolist()
    assert segments(pivot, source, which) == naive_segments(pivot, source, which)


def test_a_segment_with_one_token_that_is_not_covered_is_left_out_on_both_sides() -> None:
    """Cuts at 0, 3 and 6; in the piece from 3 the pivot's second token, inside the source's, is not covered."""
    pivot = prepared([([(0, 3), (3, 5), (5, 6), (6, 9)], True)])
    source = prepared([([(0, 2), (2, 3), (3, 6), (6, 6), (6, 9)], True)])
    ours, theirs = segments(pivot, source, [True, True, False, True, True])
    assert ours == [True, False, False, True, False]
    assert theirs == [True, True, False, True, True, False]  # the one without width counts with the token after it


def test_a_response_that_one_model_lost_is_in_no_segment() -> None:
    both, one = prepared([([(0, 2)], True), ([(0, 2)], True)]), prepared([([(0, 2)], True)])
    for pivot, source in ((one, both), (both, one)):
        which = [row < 2 for row in range(len(pivot))]
        expected = [row == 0 for row in range(len(pivot))], [row == 0 for row in range(len(source))]
        assert naive_segments(pivot, source, which) == segments(pivot, source, which) == expected


def test_what_one_model_strips_from_a_response_does_not_spoil_the_one_before() -> None:
    pivot = prepared([([(0, 4)], False), ([(0, 2), (2, 4)], False)])
    source = prepared([([(0, 4)], False), ([(2, 4)], False)])
    which, expected = [True, False, True], ([True, False, True], [True, True])
    assert naive_segments(pivot, source, which) == segments(pivot, source, which) == expected


# -- sums ---------------------------------------------------------------------------------------------------------------

TOKENS = toy("a", "b", "ab", "c")
A, B, AB, C, END = range(5)


def bits(nats: float, size: int) -> Any:
    return pytest.approx(nats / LN2 / size, abs=1e-6)


def test_sums_are_those_made_by_hand() -> None:
    """`ab|c` against `a|b|c`, and `a|b` against `ab`, of which the second pivot token is not covered."""
    pivot = conversation(TOKENS, [AB, C], [A, B], ends=END)
    source = conversation(TOKENS, [A, B, C], [AB], ends=END)
    captured = sparse(
        [{A: 0.5}, {B: 0.25}, {A: 0.5}, {END: 1.0}, {AB: 0.5}, {END: 1.0}], nll=[0.75, 1.5, 3.0, 9.0, 0.5, 9.0]
    )
    rows = sparse([{AB: 0.125, A: 0.5}, {C: 0.0625}, {END: 1.0}, {A: 0.5}, {}, {END: 0.5}], k=2)
    quality = Quality()
    quality.add(
        pivot,
        source,
        captured,
        rows=rows,
        mapped=np.array([0.75, 0.5, 1.0, 0.5, 0.9, 1.0]),
        covered=np.array([True, True, True, True, False, True]),
        little=np.array([False, False, False, False, True, False]),
        common=np.array([True, False, True, True, False, True]),
        rare=np.array([False, True, False, False, False, True]),
    )
    first, second, fourth = np.log(8), np.log(16), np.log(2)
    kept = np.log(2) + np.log(4) + np.log(1e4)  # of `a`, `b` and `c` under what was captured
    own = 0.75 + 1.5 + 3.0
    assert quality.summary() == {
        "little_mass": pytest.approx(1 / 6, abs=1e-6),
        "coverage_of_positions": pytest.approx(5 / 6, abs=1e-6),
        "coverage_of_mass": pytest.approx((0.75 + 0.5 + 1.0 + 0.5 + 1.0) / 5),
        "coverage_of_bytes": pytest.approx(3 / 5),
        "own": bits(own + 0.5, 5),
        "common": bits(first + fourth, 3),  # ends of turn have no bytes
        "transferred": bits(first + second, 3),
        "own_there": bits(own, 3),
        "own_kept_there": bits(kept, 3),
        "ratio": pytest.approx((first + second) / own, abs=1e-6),
        "ratio_to_kept": pytest.approx((first + second) / kept, abs=1e-6),
        "rarely_cut": pytest.approx(1 / 6, abs=1e-6),
        "nats_where_rarely_cut": pytest.approx(second, abs=1e-6),
    }


def test_nothing_added_is_undefined_and_not_zero() -> None:
    assert set(Quality().summary().values()) == {None}


def test_conversations_add_up() -> None:
    one, two = Quality(), Quality()
    source = conversation(TOKENS, [A, B])
    every = np.ones(2, dtype=bool)
    given = {"mapped": np.ones(2), "covered": every, "little": ~every, "common": every, "rare": ~every}
    captured, rows = sparse([{A: 0.5}, {B: 0.5}], nll=[0.5, 0.5]), sparse([{A: 0.5}, {B: 0.25}])
    one.add(source, source, captured, rows=rows, **given)
    two.add(source, source, captured, rows=rows, **given)
    two.add(source, source, captured, rows=rows, **given)
    assert two.segment_nll == pytest.approx(2 * one.segment_nll) == pytest.approx(2 * np.log(8))
    assert two.bytes == 2 * one.bytes == 4
    assert two.summary() == one.summary()


TEXTS = ["The answer is 3: größer.", " the capital of 日本 is 東京 🙂"]


@each("kind, chain_rule", itertools.product(tiny.KINDS, (False, True)))
def test_identical_tokenizers_transfer_the_sources_own(tokenizers: dict[str, Any], kind: str, chain_rule: bool) -> None:
    """With all gold tokens kept, the ratio of the two nlls is one."""
    template = ChatTemplate(tokenizers[kind], tiny.TEMPLATES[kind], kind)
    side = Side.of(TokenBytes(tokenizers[kind]), template.end_of_turn)
    pair = Pair(side, side, Strategy(chain_rule=chain_rule))
    chance, sides = np.random.default_rng(3), []
    for text in TEXTS:
        messages = (Message("user", "Go on."), Message("assistant", text))
        rows = prepare_conversation(Conversation(messages, "here"), template, max_length=200)[0]
        kept = []
        for gold in rows.gold.tolist():
            others = [token for token in chance.choice(len(side.tokens), 4).tolist() if token != gold]
            shares = chance.dirichlet(np.ones(len(others) + 2)).clip(1e-3) * 0.99
            kept.append({gold: shares[0]} | dict(zip(others, shares[1:].tolist(), strict=False)))
        sides.append((rows, sparse(kept, k=5, nll=gold_nll_of(kept, rows))))
    survey, quality = Survey(pair), Quality()
    for rows, captured in sides:
        survey.count(rows, rows)
        survey.need(rows, rows, captured)
    aligner = Aligner(
        pair, pair.build_map(survey.seen(), BackOff(side.tokens)), pair.extendable_tokens(survey.counts())
    )
    for rows, captured in sides:
        alignment, _, result = aligner.transferred(rows, rows, captured, k=5)
        every = covered(alignment, result)
        where = {"covered": every, "little": ~every, "common": every, "rare": ~every}
        quality.add(rows, rows, captured, rows=result.rows, mapped=result.mapped, **where)
    found = quality.summary()
    assert found["ratio"] == pytest.approx(1.0, abs=2e-6)
    assert found["coverage_of_bytes"] == 1.0
    size = sum(len(text.encode()) for text in TEXTS) * np.log(2)
    own, lead = (
        sum(captured.nll[which(rows)].sum(dtype=np.float64) for rows, captured in sides) / size
        for which in (lambda rows: ~rows.end_of_turn, lambda rows: rows.lead)
    )
    assert (lead > 0) == (kind == "gemma")  # its template's space stands alone before the second text
    assert found["own"] == pytest.approx(own, rel=1e-5)
    assert found["transferred"] == pytest.approx(own - lead, rel=1e-5)


# -- figures of a whole set ---------------------------------------------------------------------------------------------


def test_figures_count_rows_and_share_out_mass() -> None:
    """`a|b|c|a|b` against `ab|c|ab`: given `a`, all mass is `ab`'s the first time, and the second time nothing is left of any."""
    pivot = conversation(TOKENS, [A, B, C, A, B], ends=END)
    source = conversation(TOKENS, [AB, C, AB], ends=END)
    captured = sparse([{AB: 0.5, C: 0.25}, {C: 0.75}, {C: 0.5}, {END: 1.0}], nll=[0.7, 0.3, 3.0, 0.0])
    other = toy("a", "b", "zz")
    pair = Pair(Side.of(other, 3), Side.of(TOKENS, END), Strategy(vocabulary="exact", unaligned="condition"))
    survey = Survey(pair)
    survey.need(pivot, source, captured)
    aligner = Aligner(pair, pair.build_map(survey.seen(), BackOff(other)), np.zeros(5, dtype=bool))
    alignment, candidates, result = aligner.transferred(pivot, source, captured, k=2)
    figures = AlignmentStats()
    figures.add(alignment, candidates, result, aligner.map, little=np.zeros(6, dtype=bool))
    figures.add_without_source(6)
    assert figures.summary() == {
        "conversations": 1,
        "conversations_without_source": 1,
        "positions": 12,
        "positions_aligned": 4,
        "positions_clipped": 0,
        "positions_inside_a_source_token": 2,
        "positions_conditioned": 1,
        "positions_by_the_chain_rule": 0,
        "positions_where_the_source_rarely_cuts": 0,
        "lead_positions": 0,
        "lead_positions_aligned": 0,
        "positions_without_candidate": 3,  # `ab` and `c` are no tokens of the pivot's
        "positions_of_little_mass": 0,
        "coverage_of_positions": round(5 / 12, 6),
        "coverage_of_mass": 0.4,
        "kept_mass": 0.4,
        # 0.5, 0.25, 0.75 and 0.5 are nothing's, 1 is `b`'s, 1 the end of turn's
        "mass_by_origin": {"same bytes": 0.25, "special": 0.25, "tail": 0.5},
    }


@each("unaligned", ["label", "condition", "skip"])
def test_a_row_of_which_little_is_mapped_has_no_target(unaligned: Any) -> None:
    """`c` is no token of the pivot's: of the first row 0.4 arrives, of the second 0.6, of the end of turn 1; of what is nowhere
    aligned the gold token may stand in, of this not."""
    pivot, source = conversation(toy("a", "b"), [0, 1], ends=2), conversation(TOKENS, [A, B], ends=END)
    captured = sparse([{C: 0.5, A: 0.4}, {B: 0.6, C: 0.3}, {END: 1.0}])
    for least, taught in ((0.0, 3), (0.4, 3), (0.5, 2), (0.7, 1)):
        strategy = Strategy(vocabulary="exact", unaligned=unaligned, min_mass=least)
        pair = Pair(Side.of(toy("a", "b"), 2), Side.of(TOKENS, END), strategy)
        survey = Survey(pair)
        survey.need(pivot, source, captured)
        aligner = Aligner(pair, pair.build_map(survey.seen(), BackOff(pair.pivot.tokens)), np.zeros(5, dtype=bool))
        found = aligner.align(pivot, source, captured, k=2)
        bare, full = [[-1, -1], [-1, -1], [2, -1]], [[0, -1], [1, -1], [2, -1]]
        assert found.ids.tolist() == bare[: 3 - taught] + full[3 - taught :]
        assert found.tail == pytest.approx([1.0] * (3 - taught) + [0.6, 0.4, 0.0][3 - taught :])
        summary = aligner.figures.summary()
        assert (summary["positions_aligned"], summary["positions_of_little_mass"]) == (3, 3 - taught)
        assert summary["coverage_of_positions"] == round(taught / 3, 6)
        assert summary["coverage_of_mass"] == round(sum([0.4, 0.6, 1.0][3 - taught :]) / taught, 6)


def test_figures_of_nothing_are_undefined_and_those_of_parts_add_up() -> None:
    summary = AlignmentStats().summary()
    shares = {key for key, value in summary.items() if value is None}
    assert shares == {"coverage_of_positions", "coverage_of_mass", "kept_mass"}
    assert summary["mass_by_origin"] == {}
    one = AlignmentStats(conversations=1, positions=4, aligned=3, mapped_mass=1.5)
    one.mass_by_origin.update({SEEN: 0.5})
    two = AlignmentStats(conversations=2, positions=5, inside=1, mapped_mass=0.25)
    two.mass_by_origin.update({SEEN: 0.25, EDIT: 1.0})
    add_figures(one, two)
    counts = {"conversations": 3, "positions": 9, "aligned": 3, "inside": 1, "mapped_mass": 1.75}
    assert one == AlignmentStats(**counts, mass_by_origin=one.mass_by_origin)
    assert one.mass_by_origin == {SEEN: 0.75, EDIT: 1.0}
    assert two.mass_by_origin == {SEEN: 0.25, EDIT: 1.0}
