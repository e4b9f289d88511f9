"""Distribution transfer against a dense matrix product, and positions whose token takes in template text."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fusechat.align.aligner import Aligner, Side
from fusechat.align.sequence import Alignment
from fusechat.align.transfer import Transferred, clipped_entries, mapped_entries, transfer
from fusechat.align.vocabulary import BackOff, VocabularyMap
from fusechat.capture.top_k import capture_batch
from fusechat.core.conversations import Conversation, Message
from fusechat.core.distributions import SparseDistribution
from fusechat.core.prepared import Prepared
from fusechat.core.spans import TokenBytes
from fusechat.core.templates import ChatTemplate
from fusechat.prepare.tokenise import prepare_conversation

SOURCE, PIVOT, K = 9, 7, 4  # sizes of two vocabularies, and the candidates captured


def sparse(rows: list[dict[int, float]], k: int = K) -> SparseDistribution:
    """Rows of token → probability, most likely first, padded to k."""
    ids, logprobs = np.full((len(rows), k), -1, dtype=np.int32), np.full((len(rows), k), -np.inf, dtype=np.float64)
    for index, row in enumerate(rows):
        for rank, (token, probability) in enumerate(sorted(row.items(), key=lambda item: -item[1])):
            ids[index, rank], logprobs[index, rank] = token, np.log(probability)
    return SparseDistribution(ids, logprobs, np.zeros(len(rows), dtype=np.float32))


def dense(rows: SparseDistribution, size: int) -> np.ndarray:
    result = np.zeros((len(rows.ids), size))
    for index in range(len(rows.ids)):
        for token, logprob in zip(rows.ids[index].tolist(), rows.logprobs[index].tolist(), strict=True):
            if token >= 0:
                result[index, token] += np.exp(logprob)
    return result


def map_of(matrix: np.ndarray) -> VocabularyMap:
    """The sparse form of a dense W."""
    entries = [np.flatnonzero(row) for row in matrix]
    return VocabularyMap(
        source=np.arange(len(matrix)),
        offset=np.concatenate([[0], np.cumsum([len(row) for row in entries])]).astype(np.int64),
        pivot=np.concatenate(entries).astype(np.int64),
        weight=np.concatenate([matrix[index, row] for index, row in enumerate(entries)]),
        how=["seen"] * len(matrix),
    )


def plain(source_row: list[int]) -> Alignment:
    rows = np.array(source_row, dtype=np.int64)
    return Alignment(rows, np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64))


@st.composite
def problems(draw: Any) -> tuple[list[dict[int, float]], np.ndarray, list[int]]:
    """Source rows, a row-stochastic W in which some tokens go to the tail, and which source row each pivot row has."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.lists(st.integers(0, SOURCE - 1), max_size=K, unique=True))
        shares = draw(st.lists(st.integers(1, 50), min_size=len(tokens), max_size=len(tokens)))
        rest = draw(st.integers(0, 30))
        rows.append({token: share / (sum(shares) + rest) for token, share in zip(tokens, shares, strict=True)})
    counts = np.array(
        [draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=PIVOT, max_size=PIVOT)) for _ in range(SOURCE)]
    )
    matrix = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return rows, matrix, draw(st.lists(st.integers(-1, len(rows) - 1), min_size=1, max_size=5))


def run(rows: list[dict[int, float]], matrix: np.ndarray, source_row: list[int], k: int) -> Transferred:
    return transfer(*mapped_entries(plain(source_row), sparse(rows), map_of(matrix)), n=len(source_row), k=k)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_transfer_is_the_dense_matrix_product(
    problem: tuple[list[dict[int, float]], np.ndarray, list[int]],
) -> None:
    rows, matrix, source_row = problem
    result = run(rows, matrix, source_row, k=PIVOT)
    expected = np.zeros((len(source_row), PIVOT))
    for i, j in enumerate(source_row):
        for t in range(PIVOT):
            expected[i, t] = sum(p * matrix[s, t] for s, p in rows[j].items()) if j >= 0 else 0.0
    assert dense(result.rows, PIVOT) == pytest.approx(expected, abs=1e-12)
    assert result.mapped == pytest.approx(expected.sum(axis=1), abs=1e-12)
    assert result.tail + result.rows.probabilities.sum(axis=1) == pytest.approx(np.ones(len(source_row)), abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, PIVOT))
def test_the_k_largest_are_kept_in_order_and_the_rest_joins_the_tail(
    problem: tuple[list[dict[int, float]], np.ndarray, list[int]], k: int
) -> None:
    rows, matrix, source_row = problem
    whole, cut = run(rows, matrix, source_row, k=PIVOT), run(rows, matrix, source_row, k=k)
    full = dense(whole.rows, PIVOT)
    for index in range(len(source_row)):
        kept = [token for token in cut.rows.ids[index].tolist() if token >= 0]
        probabilities = full[index][kept]
        assert len(kept) == len(set(kept)) == min(k, int((full[index] > 0).sum()))
        assert (np.diff(probabilities) <= 0).all()
        assert probabilities.sum() == pytest.approx(np.sort(full[index])[::-1][:k].sum())
        assert cut.tail[index] == pytest.approx(1 - probabilities.sum(), abs=1e-12)
        pads = cut.rows.ids[index, len(kept) :]
        assert (pads == -1).all()
        assert np.isneginf(cut.rows.logprobs[index, len(kept) :]).all()


def test_collisions_are_summed() -> None:
    matrix = np.zeros((SOURCE, PIVOT))
    matrix[0, 3] = matrix[1, 3] = 1.0
    matrix[2, [3, 5]] = 0.25, 0.75
    result = run([{0: 0.3, 1: 0.2, 2: 0.4}], matrix, [0], k=4)
    assert result.rows.ids.tolist() == [[3, 5, -1, -1]]
    assert np.exp(result.rows.logprobs[0, :2]) == pytest.approx([0.3 + 0.2 + 0.1, 0.3])
    assert result.tail == pytest.approx([0.1])


def test_of_equal_masses_the_lower_token_is_kept() -> None:
    result = transfer(np.array([0, 0, 0]), np.array([6, 2, 4]), np.array([0.25, 0.25, 0.25]), n=1, k=2)
    assert result.rows.ids.tolist() == [[2, 4]]
    assert result.tail == pytest.approx([0.5])


def test_nothing_at_all_is_all_pads() -> None:
    none = np.zeros(0, dtype=np.int64)
    result = transfer(none, none, np.zeros(0), n=2, k=3)
    assert result.rows.ids.tolist() == [[-1] * 3] * 2
    assert result.tail.tolist() == [1.0, 1.0]
    assert result.mapped.tolist() == [0.0, 0.0]


def test_a_source_token_that_goes_to_the_tail_keeps_its_mass_there() -> None:
    result = run([{0: 0.6, 8: 0.4}], np.eye(SOURCE, PIVOT), [0], k=3)  # token 8 has an empty row
    assert result.rows.ids.tolist() == [[0, -1, -1]]
    assert result.tail == pytest.approx([0.4])


# -- tokens that take in template text before the content ---------------------------------------------------------------


def token(tokens: TokenBytes, piece: str) -> int:
    found = tokens.tokenizer.convert_tokens_to_ids(piece)
    assert found != tokens.tokenizer.unk_token_id
    return int(found)


def clipped(
    tokenizers: dict[str, Any],
    *,
    pivot: str,
    source: str,
    candidates: dict[str, float],
    golds: tuple[str, str],
    clip: tuple[int, int],
) -> dict[str, float]:
    """What one clipped position gives: pivot piece → mass."""
    ours, theirs = TokenBytes(tokenizers[pivot]), TokenBytes(tokenizers[source])
    row, ids, mass = clipped_entries(
        Alignment(np.array([0]), np.array([clip[0]]), np.array([clip[1]])),
        sparse([{token(theirs, piece): p for piece, p in candidates.items()}], k=6),
        gold=(np.array([token(ours, golds[0])]), np.array([token(theirs, golds[1])])),
        spell=(ours, theirs),
        back_off=BackOff(ours),
        roles={theirs.tokenizer.eos_token_id: ours.tokenizer.eos_token_id},
    )
    assert row.tolist() == [0] * len(ids)
    found: dict[str, float] = {}
    for piece, probability in zip(tokenizers[pivot].convert_ids_to_tokens(ids.tolist()), mass.tolist(), strict=True):
        found[piece] = found.get(piece, 0.0) + probability
    return found


def test_a_clipped_source_row_loses_the_templates_space_and_backs_off(tokenizers: dict[str, Any]) -> None:
    """The source's `▁the` took the template's space, the pivot's `t` begins with the content."""
    found = clipped(
        tokenizers,
        pivot="gemma",
        source="mistral",
        candidates={"▁the": 0.5, "▁12": 0.125, "he": 0.25, "▁": 0.0625, "</s>": 0.03125},
        golds=("t", "▁the"),
        clip=(0, 1),
    )
    assert tokenizers["gemma"].tokenize("\x01the12") == ["<0x01>", "t", "h", "e", "1", "2"]
    # `he` does not begin with the space, and of `▁` nothing is left: both go to the tail.
    assert found == pytest.approx({"t": 0.5, "1": 0.125, "<eos>": 0.03125})


def test_a_clipped_pivot_row_gets_the_space_that_its_own_token_took(tokenizers: dict[str, Any]) -> None:
    found = clipped(
        tokenizers,
        pivot="mistral",
        source="llama",
        candidates={"t": 0.5, "Ġthe": 0.25},
        golds=("▁the", "t"),
        clip=(1, 0),
    )
    assert found == pytest.approx({"▁t": 0.5, "▁": 0.25})


def test_both_clipped_by_the_same_space_keep_their_words(tokenizers: dict[str, Any]) -> None:
    found = clipped(
        tokenizers,
        pivot="gemma",
        source="mistral",
        candidates={"▁the": 0.75, "▁a": 0.125},
        golds=("▁the", "▁the"),
        clip=(1, 1),
    )
    assert found == pytest.approx({"▁the": 0.75, "▁a": 0.125})


# -- the alignment as a whole -------------------------------------------------------------------------------------------

TURNS = [("What is 1 + 2?", "The answer is 3."), ("the capital", " the capital of 日本 is 東京"), ("yes", "yes")]


def prepare(tokenizers: dict[str, Any], kind: str) -> tuple[Side, list[Prepared]]:
    template = ChatTemplate(tokenizers[kind], tiny.TEMPLATES[kind], kind)
    side = Side(TokenBytes(tokenizers[kind]), template.end_of_turn)
    conversations = [
        Conversation((Message("user", user), Message("assistant", answer)), "here") for user, answer in TURNS
    ]
    return side, [prepare_conversation(one, template, max_length=200)[0] for one in conversations]


@pytest.mark.parametrize("unaligned", ["label", "skip"])
@pytest.mark.parametrize(("pivot", "source"), [("llama", "mistral"), ("mistral", "gemma"), ("gemma", "llama")])
def test_every_row_keeps_its_mass_and_unaligned_rows_are_as_asked(
    tokenizers: dict[str, Any], loaded: dict[str, Any], pivot: str, source: str, unaligned: str
) -> None:
    (our_side, ours), (their_side, theirs) = prepare(tokenizers, pivot), prepare(tokenizers, source)
    captured = [rows for rows in capture_batch(loaded[source], theirs, k=5) if rows is not None]
    assert len(captured) == len(TURNS)
    aligner = Aligner(our_side, their_side, unaligned=unaligned)
    for one, other, rows in zip(ours, theirs, captured, strict=True):
        aligner.count(one, other, rows)
    aligner.finish_counting()
    for one, other, rows in zip(ours, theirs, captured, strict=True):
        found = aligner.align(one, other, rows, k=8)
        starts = {(max(0, b), c): j for j, (b, e, c) in reversed(list(enumerate(keys(other)))) if c or e > max(0, b)}
        for i, (begin, end, closing) in enumerate(keys(one)):
            j = starts.get((max(0, begin), closing)) if closing or end > max(0, begin) else None
            if j is None:
                one_hot = [int(one.gold[i])] if unaligned == "label" else [-1]
                assert found.ids[i].tolist() == one_hot + [-1] * 7
                assert found.logprobs[i, 0] == (0.0 if unaligned == "label" else -np.inf)
            else:
                assert found.probabilities[i].sum() <= rows.probabilities[j].sum() + 1e-6
    assert aligner.summary()["positions"] == sum(map(len, ours))


def keys(rows: Prepared) -> list[tuple[int, int, bool]]:
    """Begin, end and end of turn of each row of a conversation with one response; ends of turn all begin together."""
    columns = zip(rows.begin.tolist(), rows.end.tolist(), rows.end_of_turn.tolist(), strict=True)
    return [(0 if closing else begin, end, closing) for begin, end, closing in columns]


def test_a_conversation_without_source_is_one_hot_or_nothing(tokenizers: dict[str, Any]) -> None:
    (our_side, ours), (their_side, _) = prepare(tokenizers, "llama"), prepare(tokenizers, "gemma")
    labelled = Aligner(our_side, their_side, unaligned="label").unaligned(ours[0], k=3)
    assert labelled.ids[:, 0].tolist() == ours[0].gold.tolist()
    assert labelled.probabilities.sum(axis=1).tolist() == [1.0] * len(ours[0])
    skipped = Aligner(our_side, their_side, unaligned="skip").unaligned(ours[0], k=3)
    assert (skipped.ids == -1).all()
