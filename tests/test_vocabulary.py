"""The vocabulary map: counts, stochastic rows, special tokens by role, and the order of the back-offs."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fusechat.align.vocabulary import (
    TAIL,
    BackOff,
    Counts,
    Roles,
    VocabularyMap,
    back_offs,
    build_map,
    count_pairs,
    role_map,
)
from fusechat.core.spans import TokenBytes

PAIRS = st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=12), max_size=5)
FEW = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def table(tokenizers: dict[str, Any]) -> dict[str, TokenBytes]:
    return {kind: TokenBytes(tokenizers[kind]) for kind in tiny.KINDS}


def counted(batches: list[list[tuple[int, int]]]) -> Counts:
    return count_pairs(
        (np.array([s for s, _ in batch], dtype=np.int32), np.array([t for _, t in batch], dtype=np.int32))
        for batch in batches
    )


def rows_of(vocabulary_map: VocabularyMap) -> dict[int, dict[int, float]]:
    rows = {}
    for index, source in enumerate(vocabulary_map.source.tolist()):
        entries = slice(int(vocabulary_map.offset[index]), int(vocabulary_map.offset[index + 1]))
        rows[source] = dict(
            zip(vocabulary_map.pivot[entries].tolist(), vocabulary_map.weight[entries].tolist(), strict=True)
        )
    return rows


def letters(table: TokenBytes, text: str) -> list[int]:
    """Ids of tokens that a text names, one a character."""
    return [table.tokenizer.convert_tokens_to_ids(character) for character in text]


@FEW
@given(PAIRS)
def test_a_pair_that_occurs_twice_counts_twice(batches: list[list[tuple[int, int]]]) -> None:
    counts = counted(batches)
    expected = Counter(pair for batch in batches for pair in batch)
    found = list(zip(counts.source.tolist(), counts.pivot.tolist(), strict=True))
    assert found == sorted(expected)
    assert counts.count.tolist() == [expected[pair] for pair in found]


def test_large_ids_do_not_run_into_each_other() -> None:
    counts = counted([[(262_143, 5), (5, 262_143), (5, 262_143)]])
    assert counts.source.tolist() == [5, 262_143]
    assert counts.pivot.tolist() == [262_143, 5]
    assert counts.count.tolist() == [2, 1]


@FEW
@given(batches=PAIRS, needed=st.sets(st.integers(0, 9)))
def test_rows_are_the_counts_over_their_sum(
    tokenizers: dict[str, Any], batches: list[list[tuple[int, int]]], needed: set[int]
) -> None:
    """Ids are letters of both vocabularies, so that what is not seen corresponds by its bytes."""
    source, pivot = TokenBytes(tokenizers["llama"]), TokenBytes(tokenizers["gemma"])
    ours, theirs = letters(source, "abcdefghij"), letters(pivot, "abcdefghij")
    named = [[(ours[s], theirs[t]) for s, t in batch] for batch in batches]
    found = build_map(
        counted(named),
        np.array(sorted(ours[index] for index in needed), dtype=np.int64),
        source=source,
        back_off=BackOff(pivot),
        roles={},
        top_1=False,
    )
    total = Counter(pair for batch in named for pair in batch)
    expected = {}
    for token in {s for s, _ in total} | {ours[index] for index in needed}:
        row = {t: count for (s, t), count in total.items() if s == token}
        expected[token] = {t: count / sum(row.values()) for t, count in row.items()} or {theirs[ours.index(token)]: 1.0}
    assert rows_of(found).keys() == expected.keys()
    assert all(row == pytest.approx(expected[token]) for token, row in rows_of(found).items())
    assert [sum(row.values()) for row in rows_of(found).values()] == pytest.approx([1.0] * len(expected))
    assert found.source.tolist() == sorted(expected)


def test_top_1_keeps_the_most_frequent_and_of_equals_the_lowest(table: dict[str, TokenBytes]) -> None:
    a, b = letters(table["llama"], "ab")
    t = sorted(letters(table["gemma"], "xyz"))
    counts = counted([[(a, t[2]), (a, t[0]), (a, t[2]), (b, t[1]), (b, t[0])]])
    needed = np.zeros(0, dtype=np.int64)
    common = {"source": table["llama"], "back_off": BackOff(table["gemma"]), "roles": {}}
    assert rows_of(build_map(counts, needed, top_1=True, **common)) == {a: {t[2]: 1.0}, b: {t[0]: 1.0}}
    whole = rows_of(build_map(counts, needed, top_1=False, **common))
    assert whole[a] == pytest.approx({t[2]: 2 / 3, t[0]: 1 / 3})


def test_special_tokens_correspond_by_role_whatever_was_counted(table: dict[str, TokenBytes]) -> None:
    llama, mistral = table["llama"], table["mistral"]
    end, pad = (llama.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>"))
    (wrong,) = letters(mistral, "x")
    eos = mistral.tokenizer.eos_token_id
    found = build_map(
        counted([[(end, wrong), (pad, wrong)]]),
        np.array(sorted([end, pad])),
        source=llama,
        back_off=BackOff(mistral),
        roles={end: eos},
        top_1=False,
    )
    assert rows_of(found) == {end: {eos: 1.0}, pad: {}}  # a special token without a role goes to the tail
    assert back_offs(found) == {"special": 1, "tail": 1}


def test_roles_pair_what_tokens_do_and_end_of_turn_goes_last() -> None:
    both = role_map(Roles(11, 12, 13), Roles(21, 22, 23))
    assert both == {21: 11, 22: 12, 23: 13}
    assert role_map(Roles(11, 12, 13), Roles(22, 22, 23)) == {22: 11, 23: 13}
    assert role_map(Roles(11, 12, None), Roles(21, 22, 23)) == {21: 11, 22: 12, 23: TAIL}
    assert role_map(Roles(11, 12, 13), Roles(None, 22, None)) == {22: 12}


def test_back_off_takes_the_same_bytes_first(table: dict[str, TokenBytes]) -> None:
    back_off = BackOff(table["gemma"])
    vocabulary = table["gemma"].tokenizer.get_vocab()
    assert back_off(b" the") == (vocabulary["▁the"], "same bytes")
    assert back_off("本".encode()) == (vocabulary["本"], "same bytes")
    assert BackOff(table["llama"])(b" the") == (table["llama"].tokenizer.get_vocab()["Ġthe"], "same bytes")


@pytest.mark.parametrize("kind", ["mistral", "gemma"])
@pytest.mark.parametrize("character", ["a", "1", "\n", "!"])
def test_of_two_tokens_with_the_same_bytes_the_one_that_the_pivot_writes(
    table: dict[str, TokenBytes], kind: str, character: str
) -> None:
    """`a` has the same byte as the fallback token `<0x61>`, which the pivot never writes for it."""
    tokenizer = table[kind].tokenizer
    written = tokenizer("\x01" + character, add_special_tokens=False).input_ids[-1]
    assert tokenizer.convert_ids_to_tokens(written) == character
    assert BackOff(table[kind])(character.encode()) == (written, "same bytes")


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("text", ["qzx", " thezz", "zthe", "\u00f0\u00f0", "日京", "  the", "𝄞!"])
def test_back_off_is_then_the_first_token_in_the_middle_of_a_text(
    table: dict[str, TokenBytes], kind: str, text: str
) -> None:
    """Against the encoding of the text after a character that merges with nothing; no dummy prefix, never unk."""
    tokenizer = table[kind].tokenizer
    assert all(table[kind][token] != text.encode() for token in range(len(tokenizer)))
    found, how = BackOff(table[kind])(text.encode())
    middle = tokenizer("\x01" + text, add_special_tokens=False).input_ids
    before = tokenizer("\x01", add_special_tokens=False).input_ids
    assert middle[: len(before)] == before
    assert found == middle[len(before)]
    assert how == "first token"


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_bytes_that_are_no_text_take_the_longest_token_that_begins_them(
    table: dict[str, TokenBytes], kind: str
) -> None:
    tokens = table[kind]
    for data in (b"\xe6\x97", b"the\xff", b"\xc3\xb6\xff", b"\xf0\x9f"):
        by_name = sorted(tokens.tokenizer.get_vocab().items(), key=lambda item: not item[0].startswith("<0x"))
        spelt = {tokens[token]: token for _, token in by_name if token not in tokens.special}  # byte tokens yield
        longest = next(data[:size] for size in range(len(data), 0, -1) if data[:size] in spelt)
        found, how = BackOff(tokens)(data)
        assert found == spelt[longest]
        assert how == ("same bytes" if longest == data else "longest prefix")


def words_only() -> TokenBytes:
    """A pivot that has unk, an end of sequence, and few words: most bytes have no token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "ab": 2}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<unk>"), AddedToken("</s>")])
    return TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"))


def test_what_no_pivot_token_begins_goes_to_the_tail_never_to_unk_or_end_of_sequence() -> None:
    back_off = BackOff(words_only())
    assert back_off(b"zz") == (TAIL, "tail")
    assert back_off(b"\xff") == (TAIL, "tail")
    assert back_off(b"</s>") == (TAIL, "tail")
    assert back_off(b"<unk>") == (TAIL, "tail")
    assert back_off(b"") == (TAIL, "tail")
    assert back_off(b"ab")[0] == 2


@FEW
@given(data=st.binary(max_size=8))
def test_a_back_off_token_always_begins_the_bytes(tokenizers: dict[str, Any], data: bytes) -> None:
    for kind in tiny.KINDS:
        tokens = TokenBytes(tokenizers[kind])
        found, how = BackOff(tokens)(data)
        assert (found == TAIL) == (how == "tail") == (not data)
        if found != TAIL:
            assert data.startswith(tokens[found])
            assert tokens[found]
            assert found not in tokens.special


def test_an_unknown_token_is_an_error_not_another_tokens_row(table: dict[str, TokenBytes]) -> None:
    a, b, c = sorted(letters(table["llama"], "abc"))
    found = build_map(
        counted([]),
        np.array([a, c]),
        source=table["llama"],
        back_off=BackOff(table["gemma"]),
        roles={},
        top_1=False,
    )
    assert found.rows_of(np.array([c, a, c])).tolist() == [1, 0, 1]
    for unknown in (b, c + 1):
        with pytest.raises(KeyError):
            found.rows_of(np.array([unknown]))


def test_an_id_in_the_models_padding_goes_to_the_tail(table: dict[str, TokenBytes]) -> None:
    padding = len(table["mistral"]) + 3
    found = build_map(
        counted([]),
        np.array([padding]),
        source=table["mistral"],
        back_off=BackOff(table["llama"]),
        roles={},
        top_1=False,
    )
    assert rows_of(found) == {padding: {}}


def test_entropy_is_the_mean_over_counted_rows(table: dict[str, TokenBytes]) -> None:
    a, b, c = letters(table["llama"], "abc")
    x, y = letters(table["gemma"], "xy")
    counts = counted([[(a, x), (a, y), (b, x)]])
    common = {"source": table["llama"], "back_off": BackOff(table["gemma"]), "roles": {}, "top_1": False}
    found = build_map(counts, np.array([c]), **common)
    assert found.entropy() == pytest.approx((1.0 + 0.0) / 2)  # one bit for a, none for b; c was never seen
    assert build_map(counted([]), np.array([c]), **common).entropy() == 0.0
