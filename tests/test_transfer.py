"""Distribution transfer against a dense matrix product in float64, and the alignment as a whole."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from aligning import dense, map_of, sparse
from cases import each
from fusechat.align.aligner import Aligner, Pair, Side, Strategy, Survey
from fusechat.align.back_off import BackOff
from fusechat.align.candidates import Candidates
from fusechat.align.transfer import Transfer, Transferred
from fusechat.capture.local import Local
from fusechat.data.conversations import Conversation, Message
from fusechat.data.prepared import Prepared
from fusechat.models.templates import ChatTemplate
from fusechat.models.token_bytes import TokenBytes
from fusechat.models.tokenise import prepare_conversation

ROWS, PIVOT = 9, 7  # rows of W, tokens of the pivot
# Rows of W in powers of two, so that sums are exact whatever their order, and ties abound; the last goes to the tail.
SHAPES = [[1.0], [0.5, 0.5], [0.5, 0.25, 0.25], [0.25] * 4, [0.75, 0.25], []]


def candidates(row: Any, mass: Any, own: Any = None, chained: Any = None) -> Candidates:
    row = np.array(row, dtype=np.int64)
    return Candidates(
        row,
        np.array(mass, dtype=np.float64),
        np.zeros(len(row), dtype=bool) if own is None else np.array(own, dtype=bool),
        np.full(len(row), np.nan) if chained is None else np.array(chained, dtype=np.float64),
    )


def plain(rows: list[dict[int, float]]) -> Candidates:
    """Candidates of rows of W → mass, without the chain rule."""
    width = max([1, *map(len, rows)])
    padded = [[*row.items(), *[(-1, 0.0)] * (width - len(row))] for row in rows]
    return candidates([[entry for entry, _ in row] for row in padded], [[mass for _, mass in row] for row in padded])


@st.composite
def matrices(draw: Any) -> np.ndarray:
    matrix = np.zeros((ROWS, PIVOT))
    for row in matrix:
        weights = draw(st.sampled_from(SHAPES))
        row[draw(st.permutations(range(PIVOT)))[: len(weights)]] = weights
    return matrix


@st.composite
def problems(draw: Any, chain: bool = False) -> tuple[Candidates, np.ndarray, np.ndarray]:
    """Candidates with masses in 64ths, W, and the rows' gold tokens."""
    n, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    row = [draw(st.lists(st.integers(-1, ROWS - 1), min_size=width, max_size=width)) for _ in range(n)]
    mass = [draw(st.lists(st.integers(0, 64 // width), min_size=width, max_size=width)) for _ in range(n)]
    own, chained = [False] * n, [float("nan")] * n
    if chain:
        own = [draw(st.booleans()) and entries[-1] >= 0 for entries in row]
        chained = [draw(st.sampled_from([0.0, 0.25, 0.4, 1.0, float("nan")])) for _ in range(n)]
    gold = draw(st.lists(st.integers(0, PIVOT - 1), min_size=n, max_size=n))
    return candidates(row, np.array(mass) / 64, own, chained), draw(matrices()), np.array(gold, dtype=np.int32)


def naive(given: Candidates, matrix: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """All candidates' rows of W times their mass, that of the source's own token sharpened: its gold pivot token gets what the
    chain rule says, and the others what is left in the proportions that they had."""
    result = np.zeros((len(gold), matrix.shape[1]))
    for i, target in enumerate(gold.tolist()):
        for c, (entry, mass) in enumerate(zip(given.row[i].tolist(), given.mass[i].tolist(), strict=True)):
            if entry < 0:
                continue
            row = matrix[entry].copy()
            if given.own[i] and c == given.row.shape[1] - 1 and not np.isnan(given.chained[i]):
                row[target] = 0.0
                row *= (1 - given.chained[i]) / row.sum() if row.any() else 0.0
                row[target] = given.chained[i]
            result[i] += mass * row
    return result


def run(given: Candidates, matrix: np.ndarray, gold: Any = None, *, k: int) -> Transferred:
    gold = np.zeros(len(given.row), dtype=np.int32) if gold is None else gold
    return Transfer(map_of(matrix), PIVOT)(given, gold, k=k)


@given(problems())
def test_transfer_is_the_dense_matrix_product(problem: tuple[Candidates, np.ndarray, np.ndarray]) -> None:
    given, matrix, gold = problem
    result = run(given, matrix, gold, k=PIVOT)
    p = np.zeros((len(gold), ROWS))
    for i in range(len(gold)):
        real = given.row[i] >= 0
        np.add.at(p[i], given.row[i][real], given.mass[i][real])
    expected = p @ matrix
    assert dense(result.rows, PIVOT) == pytest.approx(expected, abs=1e-12)
    assert result.mapped == pytest.approx(expected.sum(axis=1), abs=1e-12)


@given(problems(), st.integers(1, PIVOT + 3))
def test_the_k_largest_are_kept_in_order_and_of_equals_the_lower_id(
    problem: tuple[Candidates, np.ndarray, np.ndarray], k: int
) -> None:
    """Ties are exact here. A k past the pivot's vocabulary leaves pads."""
    given, matrix, gold = problem
    rows = run(given, matrix, gold, k=k).rows
    expected = naive(given, matrix, gold)
    for i, row in enumerate(expected.tolist()):
        order = [token for token in sorted(range(PIVOT), key=lambda token: (-row[token], token)) if row[token] > 0][:k]
        assert rows.ids[i].tolist() == order + [-1] * (k - len(order))
        assert np.exp(rows.logprobs[i]) == pytest.approx([row[token] for token in order] + [0.0] * (k - len(order)))


@given(problems(chain=True), st.integers(1, PIVOT))
def test_what_is_kept_and_the_tail_sum_to_one(problem: tuple[Candidates, np.ndarray, np.ndarray], k: int) -> None:
    given, matrix, gold = problem
    result = run(given, matrix, gold, k=k)
    kept = result.rows.probabilities.sum(axis=1)
    assert result.rows.tail + kept == pytest.approx(np.ones(len(gold)), abs=1e-9)
    assert (kept <= result.mapped + 1e-9).all()
    assert (result.mapped <= given.mass.sum(axis=1) + 1e-9).all()


@given(problems(chain=True), problems(), st.integers(1, PIVOT))
def test_nothing_is_left_over_from_the_call_before(problem: Any, other: Any, k: int) -> None:
    given, matrix, gold = problem
    transfer = Transfer(map_of(matrix), PIVOT)
    first = transfer(given, gold, k=k)
    transfer(other[0], other[2], k=k)
    again = transfer(given, gold, k=k)
    assert again.rows.ids.tolist() == first.rows.ids.tolist()
    assert again.rows.logprobs.tolist() == first.rows.logprobs.tolist()
    assert again.mapped.tolist() == first.mapped.tolist()


def test_where_all_mass_arrives_there_is_no_tail_and_not_a_residue_of_float64() -> None:
    """As of a conditioned row, whose candidates are divided by their sum; reverse KL would chase 1e-16 by 36 nats."""
    mass = np.random.default_rng(0).random((500, 5))
    mass /= mass.sum(axis=1, keepdims=True)
    assert (mass.sum(axis=1) != 1).any()
    result = run(candidates([[*range(5)]] * 500, mass.tolist()), np.eye(ROWS, PIVOT), k=5)
    assert set(result.rows.tail.tolist()) == {0.0}


def test_collisions_are_summed() -> None:
    matrix = np.zeros((ROWS, PIVOT))
    matrix[0, 3] = matrix[1, 3] = 1.0
    matrix[2, [3, 5]] = 0.25, 0.75
    result = run(plain([{0: 0.3, 1: 0.2, 2: 0.4}]), matrix, k=4)
    assert result.rows.ids.tolist() == [[3, 5, -1, -1]]
    assert np.exp(result.rows.logprobs[0, :2]) == pytest.approx([0.3 + 0.2 + 0.1, 0.3])
    assert result.rows.tail == pytest.approx([0.1])


def test_a_candidate_without_a_row_or_with_an_empty_one_leaves_its_mass_to_the_tail() -> None:
    result = run(plain([{0: 0.5, 8: 0.25, -1: 0.125}]), np.eye(ROWS, PIVOT), k=3)  # row 8 is empty
    assert result.rows.ids.tolist() == [[0, -1, -1]]
    assert result.rows.tail == pytest.approx([0.5])
    assert result.mapped == pytest.approx([0.5])
    result = run(candidates([[-1], [-1]], [[0.0], [0.0]]), np.eye(ROWS, PIVOT), k=3)
    assert result.rows.ids.tolist() == [[-1] * 3] * 2
    assert np.isneginf(result.rows.logprobs).all()
    assert (result.rows.tail.tolist(), result.mapped.tolist()) == ([1.0, 1.0], [0.0, 0.0])


# -- the source's own token, by the chain rule --------------------------------------------------------------------------
@given(problems(chain=True))
def test_the_own_tokens_row_of_w_is_sharpened_as_the_dense_one(problem: Any) -> None:
    given, matrix, gold = problem
    result = run(given, matrix, gold, k=PIVOT)
    expected = naive(given, matrix, gold)
    assert dense(result.rows, PIVOT) == pytest.approx(expected, abs=1e-12)
    assert result.mapped == pytest.approx(expected.sum(axis=1), abs=1e-12)


def test_the_chain_rule_by_hand() -> None:
    """W says 1/2, 1/4, 1/4; the chain rule 0.1 for the first: the others share 0.9 in halves. A mass of 0.8 has them all."""
    matrix = np.zeros((ROWS, PIVOT))
    matrix[0, [4, 2, 6]], matrix[1, 4] = (0.5, 0.25, 0.25), 1.0
    result = run(candidates([[1, 0]], [[0.2, 0.8]], [True], [0.1]), matrix, np.array([4]), k=3)
    assert result.rows.ids.tolist() == [[2, 6, 4]]
    assert np.exp(result.rows.logprobs[0]) == pytest.approx([0.36, 0.36, 0.08 + 0.2])


def test_where_w_knows_the_gold_token_alone_the_rest_joins_the_tail() -> None:
    """Only the last candidate is sharpened."""
    result = run(candidates([[0]], [[0.5]], [True], [0.25]), np.eye(ROWS, PIVOT), np.array([0]), k=2)
    assert result.rows.ids.tolist() == [[0, -1]]
    assert result.rows.tail == pytest.approx([1 - 0.125])
    first = run(candidates([[0, 1]], [[0.5, 0.25]], [True], [0.0]), np.eye(ROWS, PIVOT), np.array([0]), k=2)
    assert np.exp(first.rows.logprobs) == pytest.approx(np.array([[0.5, 0.25]]))


@given(problems(chain=True), st.integers(1, 3))
def test_the_gold_token_is_kept_in_any_case_where_the_own_token_is_a_candidate(problem: Any, k: int) -> None:
    given, matrix, gold = problem
    rows = run(given, matrix, gold, k=k).rows
    expected = naive(given, matrix, gold)
    for i, token in enumerate(gold.tolist()):
        kept = rows.ids[i].tolist()
        if given.own[i] and expected[i, token] > 0:
            assert token in kept
            assert rows.probabilities[i, kept.index(token)] == pytest.approx(expected[i, token])
        others = [other for other in kept if other not in (token, -1)]
        assert len(kept) - kept.count(-1) == len({*kept} - {-1}) == min(k, int((expected[i] > 0).sum()))
        left_out = [expected[i, other] for other in range(PIVOT) if other not in kept and other != token]
        assert not others or max(left_out, default=0.0) <= min(expected[i, other] for other in others) + 1e-12


def test_without_an_own_token_gold_is_kept_only_among_the_largest() -> None:
    matrix = np.zeros((ROWS, PIVOT))
    matrix[0, [0, 1]] = 0.75, 0.25
    assert run(candidates([[0]], [[1.0]]), matrix, np.array([1]), k=1).rows.ids.tolist() == [[0]]
    own = run(candidates([[0]], [[1.0]], [True]), matrix, np.array([1]), k=1)
    assert own.rows.ids.tolist() == [[1]]
    assert own.rows.tail == pytest.approx([0.75])


# -- the alignment as a whole -------------------------------------------------------------------------------------------

TURNS = [("What is 1 + 2?", "The answer is 3."), ("the capital", " the capital of 日本 is 東京"), ("yes", "yes")]


def prepare(tokenizers: dict[str, Any], kind: str) -> tuple[Side, list[Prepared]]:
    template = ChatTemplate(tokenizers[kind], tiny.TEMPLATES[kind], kind)
    side = Side.of(TokenBytes(tokenizers[kind]), template.end_of_turn)
    conversations = [
        Conversation((Message("user", user), Message("assistant", answer)), "here") for user, answer in TURNS
    ]
    return side, [prepare_conversation(one, template, max_length=200)[0] for one in conversations]


def aligner_of(pair: Pair, sides: Any = ()) -> Aligner:
    """Counted on, and made for, (pivot, source, captured) conversations."""
    survey = Survey(pair)
    for one, other, _ in sides:
        survey.count(one, other)
    is_open = pair.extendable_tokens(survey.counts())
    survey = Survey(pair, is_open)
    for one, other, rows in sides:
        survey.count(one, other)
        survey.need(one, other, rows)
    return Aligner(pair, pair.build_map(survey.seen(), BackOff(pair.pivot.tokens)), is_open)


PAIRS = [("llama", "mistral"), ("mistral", "gemma"), ("gemma", "llama")]


@each("pivot, source, unaligned", [(*pair, unaligned) for pair in PAIRS for unaligned in ("label", "skip")])
def test_every_row_keeps_its_mass_and_unaligned_rows_are_as_asked(
    tokenizers: dict[str, Any], loaded: dict[str, Any], pivot: str, source: str, unaligned: Any
) -> None:
    (our_side, ours), (their_side, theirs) = prepare(tokenizers, pivot), prepare(tokenizers, source)
    local = Local(loaded[source], k=5, batch_tokens=10_000, name="")
    captured = [rows for rows in local.capture(theirs, lambda n: None) if rows is not None]
    assert len(captured) == len(TURNS)
    sides = list(zip(ours, theirs, captured, strict=True))
    aligner = aligner_of(Pair(our_side, their_side, Strategy(unaligned=unaligned)), sides)
    for one, other, rows in sides:
        found = aligner.align(one, other, rows, k=8)
        starts = {(max(0, b), c): j for j, (b, e, c) in reversed(list(enumerate(keys(other)))) if c or e > max(0, b)}
        for i, (begin, end, closing) in enumerate(keys(one)):
            j = starts.get((max(0, begin), closing)) if closing or end > max(0, begin) else None
            if one.lead[i]:
                same = [j for j, (b, e, c) in enumerate(keys(other)) if (b, e > b, c) == (begin, end > begin, False)]
                j = same[0] if same else None
            if j is None:
                one_hot = [int(one.gold[i])] if unaligned == "label" else [-1]
                assert found.ids[i].tolist() == one_hot + [-1] * 7
                assert found.logprobs[i, 0] == (0.0 if unaligned == "label" else -np.inf)
            else:
                assert found.probabilities[i].sum() <= rows.probabilities[j].sum() + 1e-6
    counted = aligner.figures.summary()
    assert counted["positions"] == sum(int((~one.lead).sum()) for one in ours)
    assert counted["lead_positions"] == sum(int(one.lead.sum()) for one in ours)


def keys(rows: Prepared) -> list[tuple[int, int, bool]]:
    """Begin, end and end of turn of each row of a conversation with one response; ends of turn all begin together."""
    columns = zip(rows.begin.tolist(), rows.end.tolist(), rows.end_of_turn.tolist(), strict=True)
    return [(0 if closing else begin, end, closing) for begin, end, closing in columns]


def test_rows_without_source_have_the_pivots_own_distributions_where_asked(tokenizers: dict[str, Any]) -> None:
    side, ours = prepare(tokenizers, "llama")
    fill = sparse([{int(token): 0.5, 7: 0.25} for token in ours[0].gold])
    found = aligner_of(Pair(side, side, Strategy(unaligned="pivot"))).unaligned(ours[0], k=2, fill=fill)
    assert found.ids.tolist() == fill.ids.tolist()
    assert found.probabilities.sum(axis=1) == pytest.approx([0.75] * len(ours[0]))


@each("unaligned", ["label", "condition", "skip"])
def test_a_conversation_without_source_is_one_hot_or_nothing(tokenizers: dict[str, Any], unaligned: Any) -> None:
    (our_side, ours), (their_side, _) = prepare(tokenizers, "llama"), prepare(tokenizers, "gemma")
    found = aligner_of(Pair(our_side, their_side, Strategy(unaligned=unaligned))).unaligned(ours[0], k=3)
    assert found.ids[:, 0].tolist() == ([-1] * len(ours[0]) if unaligned == "skip" else ours[0].gold.tolist())
    assert (found.ids[:, 1:] == -1).all()
    assert found.probabilities.sum(axis=1).tolist() == [0.0 if unaligned == "skip" else 1.0] * len(ours[0])
