"""What a source says where its tokens are no whole ones: inside a source token, and where one takes in template text. Against
naive loops over bytes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from aligning import conversation, map_of, sparse, toy
from cases import each
from fusechat.align.back_off import BackOff
from fusechat.align.candidates import NONE, Candidates, Remainders, gather, remainders_clipped, remainders_inside
from fusechat.align.counts import Seen
from fusechat.align.sequence import align_rows
from fusechat.align.spelling import Spelling
from fusechat.align.vocabulary import build_map
from fusechat.data.conversations import Conversation, Message
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.models.templates import ChatTemplate
from fusechat.models.token_bytes import TokenBytes
from fusechat.models.tokenise import prepare_conversation

Found = dict[tuple[int, int], tuple[float, bytes]]


@pytest.fixture(scope="module")
def table(tokenizers: dict[str, Any]) -> dict[str, TokenBytes]:
    return {kind: TokenBytes(tokenizers[kind]) for kind in tiny.KINDS}


def found(rests: Remainders) -> Found:
    """(row, column) → mass, bytes."""
    keys = zip(rests.pivot_row.tolist(), rests.column.tolist(), strict=True)
    result = dict(zip(keys, zip(rests.mass.tolist(), rests.data, strict=True), strict=True))
    assert len(result) == len(rests.data)
    return result


def inside(pivot: Prepared, source: Prepared, captured: SparseDistribution, tokens: TokenBytes) -> Found:
    alignment = align_rows(pivot, source)
    return found(remainders_inside(alignment, source, captured, tokens=tokens, spelling=Spelling.of(tokens)))


def naive_inside(pivot: Prepared, source: Prepared, captured: SparseDistribution, tokens: TokenBytes) -> Found:
    result: Found = {}
    spans = list(zip(source.response.tolist(), source.begin.tolist(), source.end.tolist(), strict=True))
    for i in range(len(pivot)):
        here, start = int(pivot.response[i]), max(int(pivot.begin[i]), 0)
        if pivot.end_of_turn[i] or pivot.end[i] <= start:
            continue
        if any(response == here and max(begin, 0) == start and end > start for response, begin, end in spans):
            continue
        for j, (response, begin, end) in enumerate(spans):
            if response != here or not max(begin, 0) < start < end:
                continue
            given = tokens[int(source.gold[j])][: start - begin]
            agreeing = {}
            for column, candidate in enumerate(captured.ids[j].tolist()):
                if candidate >= 0 and candidate not in tokens.special and tokens[candidate].startswith(given):
                    agreeing[column] = float(np.exp(captured.logprobs[j, column])), tokens[candidate][len(given) :]
            total = sum(mass for mass, _ in agreeing.values())
            result |= {(i, column): (mass / total, data) for column, (mass, data) in agreeing.items() if data}
    return result


# -- inside a source token ----------------------------------------------------------------------------------------------

TOKENS = toy("banana", "bandit", "ban", "ba", "na", "nana", "an", "split")
BANANA, BANDIT, BAN, BA, NA, NANA, AN, SPLIT, END = range(9)


def test_candidates_that_begin_with_the_bytes_given_share_the_mass() -> None:
    """`ba|nana` against `banana`: after `ba` go on `banana`, `bandit` and `ban`; `ba` has nothing left; `an` does not begin so."""
    pivot, source = conversation(TOKENS, [BA, NANA], ends=END), conversation(TOKENS, [BANANA], ends=END)
    row = {BANANA: 0.3, BANDIT: 0.2, BAN: 0.06, BA: 0.04, AN: 0.03, END: 0.02}
    result = inside(pivot, source, sparse([row, {END: 1.0}]), TOKENS)
    expected = {(1, 0): (0.5, b"nana"), (1, 1): (0.2 / 0.6, b"ndit"), (1, 2): (0.1, b"n")}
    assert result.keys() == expected.keys()
    for key, (mass, data) in expected.items():
        assert result[key] == (pytest.approx(mass), data)
    # What is missing to one is that of `ba`, of which nothing is left: it goes to the tail.
    assert 1 - sum(mass for mass, _ in result.values()) == pytest.approx(0.04 / 0.6)


def test_nothing_is_left_where_no_candidate_begins_with_the_bytes() -> None:
    pivot, source = conversation(TOKENS, [BA, NANA]), conversation(TOKENS, [BANANA])
    assert inside(pivot, source, sparse([{AN: 0.5, SPLIT: 0.25, BA: 0.125}]), TOKENS) == {}


def test_special_tokens_begin_with_nothing() -> None:
    tokens = toy("<q>ab", "<q", special=("</s>", "<q>a"))
    pivot, source = conversation(tokens, [1, 0]), conversation(tokens, [0])
    result = inside(pivot, source, sparse([{3: 0.9, 0: 0.1}]), tokens)
    assert result == {(1, 1): (pytest.approx(1.0), b">ab")}


def test_bytes_of_the_template_count_as_given() -> None:
    """The source's `split` took one byte of the template: `pl` is what it has of the content before the pivot's second token."""
    tokens = toy("split", "pl", "it", "splat", "plop", "spl")
    pivot, source = conversation(tokens, [1, 2]), conversation(tokens, [0], taken=[1])
    result = inside(pivot, source, sparse([{0: 0.2, 3: 0.3, 4: 0.4, 5: 0.05}]), tokens)
    assert {data: mass for mass, data in result.values()} == pytest.approx({b"it": 0.2 / 0.55, b"at": 0.3 / 0.55})


PIECES = [a + b + c for a in ("a", "b", "ab") for b in ("", "a", "b") for c in ("", "b", "ba")]
LETTERS = toy(*dict.fromkeys(PIECES))
SEQUENCE = st.lists(st.integers(0, len(LETTERS) - 2), min_size=1, max_size=5)


def spelt(text: bytes, draw: Any) -> list[int]:
    """Some tokens of a text."""
    tokens = []
    while text:
        fitting = [token for token in range(len(LETTERS) - 1) if text.startswith(LETTERS[token])]
        tokens.append(draw(st.sampled_from(fitting)))
        text = text[len(LETTERS[tokens[-1]]) :]
    return tokens


@st.composite
def cases(draw: Any) -> tuple[Prepared, Prepared, SparseDistribution]:
    theirs = [draw(SEQUENCE) for _ in range(draw(st.integers(1, 2)))]
    taken = [draw(st.integers(0, min(1, len(LETTERS[response[0]]) - 1))) for response in theirs]
    texts = [b"".join(LETTERS[token] for token in response)[cut:] for response, cut in zip(theirs, taken, strict=True)]
    end = len(LETTERS) - 1
    pivot = conversation(LETTERS, *(spelt(text, draw) for text in texts), ends=end)
    source = conversation(LETTERS, *theirs, ends=end, taken=taken)
    rows = []
    for _ in range(len(source)):
        kept = draw(st.lists(st.integers(0, end), unique=True, max_size=6))
        shares = draw(st.lists(st.integers(1, 9), min_size=len(kept), max_size=len(kept)))
        rows.append({token: share / 64 for token, share in zip(kept, shares, strict=True)})
    return pivot, source, sparse(rows, k=6)


@given(cases())
def test_rests_inside_are_the_loop_over_bytes(case: tuple[Prepared, Prepared, SparseDistribution]) -> None:
    result, expected = inside(*case, LETTERS), naive_inside(*case, LETTERS)
    assert result.keys() == expected.keys()
    for key, (mass, data) in expected.items():
        assert result[key] == (pytest.approx(mass), data)


ANSWERS = ["The answer is 3: größer.", " the capital of 日本 is 東京 🙂"]


@each("pivot, source", [("llama", "mistral"), ("mistral", "gemma"), ("gemma", "llama")])
def test_rests_inside_of_real_tokenizers_are_the_loop_over_bytes(
    tokenizers: dict[str, Any], table: dict[str, TokenBytes], pivot: str, source: str
) -> None:
    """Candidates are tokens that begin with the same byte, the gold one among them, and some others."""
    random, looked_at = np.random.default_rng(5), 0
    for answer in ANSWERS:
        ours, theirs = (
            prepare_conversation(
                Conversation((Message("user", "Go on."), Message("assistant", answer)), "here"),
                ChatTemplate(tokenizers[kind], tiny.TEMPLATES[kind], kind),
                max_length=200,
            )[0]
            for kind in (pivot, source)
        )
        tokens, rows = table[source], []
        for gold in theirs.gold.tolist():
            alike = [token for token in range(len(tokens)) if tokens[token][:1] == tokens[gold][:1]]
            drawn = {gold, *random.choice(alike, 6).tolist(), *random.choice(len(tokens), 3).tolist()}
            rows.append(dict(zip(drawn, random.dirichlet(np.ones(len(drawn))).tolist(), strict=True)))
        case = ours, theirs, sparse(rows, k=10)
        result, expected = inside(*case, tokens), naive_inside(*case, tokens)
        assert result.keys() == expected.keys()
        for key, (mass, data) in expected.items():
            assert result[key] == (pytest.approx(mass), data)
        looked_at += len(result)
    assert looked_at > 5


@given(
    st.lists(st.tuples(st.lists(st.integers(-1, 30), min_size=3, max_size=3), st.integers(0, 30), st.integers(1, 5)))
)
def test_left_over_is_what_comes_after_the_bytes_given(rows: list[tuple[list[int], int, int]]) -> None:
    """Ids past the end have no bytes, nor have special tokens and pads."""
    pieces = [b"" if token in LETTERS.special else LETTERS[token] for token in range(31)]
    expected = [
        [
            len(pieces[other]) - given
            if other >= 0
            and pieces[other]
            and len(pieces[token]) >= given
            and pieces[other].startswith(pieces[token][:given])
            else -1
            for other in candidates
        ]
        for candidates, token, given in rows
    ]
    candidates = np.array([row for row, _, _ in rows], dtype=np.int32).reshape(-1, 3)
    tokens, given = (np.array([row[at] for row in rows], dtype=np.int32) for at in (1, 2))
    assert Spelling.of(LETTERS).left_over(candidates, tokens, given).tolist() == expected


# -- tokens that take in template text before the content ---------------------------------------------------------------


def token(tokens: TokenBytes, piece: str) -> int:
    result = tokens.tokenizer.convert_tokens_to_ids(piece)
    assert result != tokens.tokenizer.unk_token_id
    return int(result)


def clipped(
    table: dict[str, TokenBytes], *, pivot: tuple[str, str, int], source: tuple[str, str, int], row: dict[str, float]
) -> dict[str, float]:
    """What one clipped position gives: pivot piece → mass. Each model has its kind, its token, and what that takes in."""
    ours, theirs = table[pivot[0]], table[source[0]]
    one, other = (
        conversation(table[kind], [token(table[kind], piece)], taken=[taken]) for kind, piece, taken in (pivot, source)
    )
    captured = sparse([{token(theirs, piece): mass for piece, mass in row.items()}])
    alignment = align_rows(one, other)
    rests = remainders_clipped(alignment, one, other, captured, spell=(ours, theirs))
    needed = Seen(tokens=np.unique(captured.ids), remaining_bytes=set(rests.data) - {b""})
    roles = {theirs.tokenizer.eos_token_id: ours.tokenizer.eos_token_id}
    w = build_map(needed, source=theirs, back_off=BackOff(ours), roles=roles)
    gathered = gather(alignment, captured, w, [rests])
    result: dict[str, float] = {}
    for entry, mass in zip(gathered.row[0].tolist(), gathered.mass[0].tolist(), strict=True):
        for target in w.pivot[w.offset[entry] : w.offset[entry + 1]].tolist() if entry >= 0 else []:
            piece = ours.tokenizer.convert_ids_to_tokens(target)
            result[piece] = result.get(piece, 0.0) + mass
    return result


def test_a_clipped_source_row_loses_the_templates_space_and_backs_off(table: dict[str, TokenBytes]) -> None:
    """The source's `▁the` took the template's space, the pivot's `t` begins with the content."""
    row = {"▁the": 0.5, "▁12": 0.125, "he": 0.25, "▁": 0.0625, "</s>": 0.03125}
    result = clipped(table, pivot=("gemma", "t", 0), source=("mistral", "▁the", 1), row=row)
    assert table["gemma"].tokenizer.tokenize("\x01the12") == ["<0x01>", "t", "h", "e", "1", "2"]
    # `he` does not begin with the space, and of `▁` nothing is left: both go to the tail.
    assert result == pytest.approx({"t": 0.5, "1": 0.125, "<eos>": 0.03125})


def test_a_clipped_pivot_row_gets_the_space_that_its_own_token_took(table: dict[str, TokenBytes]) -> None:
    result = clipped(table, pivot=("mistral", "▁the", 1), source=("llama", "t", 0), row={"t": 0.5, "Ġthe": 0.25})
    assert result == pytest.approx({"▁t": 0.5, "▁": 0.25})


def test_both_clipped_by_the_same_space_keep_their_words(table: dict[str, TokenBytes]) -> None:
    row = {"▁the": 0.75, "▁a": 0.125}
    result = clipped(table, pivot=("gemma", "▁the", 1), source=("mistral", "▁the", 1), row=row)
    assert result == pytest.approx(row)


def test_of_the_bytes_that_both_took_alone_nothing_is_left(table: dict[str, TokenBytes]) -> None:
    """A candidate that is the template's space says nothing of the content, although the pivot's token has that space too."""
    row = {"▁the": 0.75, "▁": 0.125}
    result = clipped(table, pivot=("gemma", "▁the", 1), source=("mistral", "▁the", 1), row=row)
    assert result == pytest.approx({"▁the": 0.75})


# -- all candidates together --------------------------------------------------------------------------------------------


def test_aligned_rows_have_whole_tokens_and_those_inside_have_bytes() -> None:
    """`ba|nana` against `banana`, both with an end of turn."""
    pivot, source = conversation(TOKENS, [BA, NANA], ends=END), conversation(TOKENS, [BANANA], ends=END)
    captured = sparse([{BANANA: 0.5, BA: 0.25, SPLIT: 0.125}, {END: 0.75}])
    alignment = align_rows(pivot, source)
    rests = remainders_inside(alignment, source, captured, tokens=TOKENS, spelling=Spelling.of(TOKENS))
    w = map_of(np.eye(len(TOKENS) + 1, len(TOKENS)), rests=[b"nana"])
    result = gather(alignment, captured, w, [rests])
    assert isinstance(result, Candidates)
    assert result.row.tolist() == [[BANANA, BA, SPLIT], [len(TOKENS), NONE, NONE], [END, NONE, NONE]]
    assert result.mass == pytest.approx(np.array([[0.5, 0.25, 0.125], [2 / 3, 0, 0], [0.75, 0, 0]]))
    assert not result.own.any()
    assert np.isnan(result.chained).all()


def test_without_bytes_the_rows_inside_have_nothing() -> None:
    pivot, source = conversation(TOKENS, [BA, NANA]), conversation(TOKENS, [BANANA])
    result = gather(align_rows(pivot, source), sparse([{BANANA: 0.5}]), map_of(np.eye(len(TOKENS))), [])
    assert result.row.tolist() == [[BANANA], [NONE]]
    assert result.mass.tolist() == [[0.5], [0.0]]
