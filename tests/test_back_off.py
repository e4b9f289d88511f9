"""A pivot token for bytes that were not counted: the order of the back-offs, and the smallest edit distance."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from aligning import edit_distance, toy
from cases import each
from fusechat.align.back_off import EDIT, TAIL, BackOff
from fusechat.align.dtw import surface
from fusechat.models.token_bytes import TokenBytes


@pytest.fixture(scope="module")
def table(tokenizers: dict[str, Any]) -> dict[str, TokenBytes]:
    return {kind: TokenBytes(tokenizers[kind]) for kind in tiny.KINDS}


def test_back_off_takes_the_same_bytes_first(table: dict[str, TokenBytes]) -> None:
    back_off = BackOff(table["gemma"])
    vocabulary = table["gemma"].tokenizer.get_vocab()
    assert back_off.lookup(b" the") == (vocabulary["▁the"], "same bytes")
    assert back_off.lookup("本".encode()) == (vocabulary["本"], "same bytes")
    assert BackOff(table["llama"]).lookup(b" the") == (table["llama"].tokenizer.get_vocab()["Ġthe"], "same bytes")


@each("kind", ["mistral", "gemma"])
def test_of_two_tokens_with_the_same_bytes_the_one_that_the_pivot_writes(
    table: dict[str, TokenBytes], kind: str
) -> None:
    """`a` has the same byte as the fallback token `<0x61>`, which the pivot never writes for it."""
    tokenizer = table[kind].tokenizer
    for character in "a1\n!":
        written = tokenizer("\x01" + character, add_special_tokens=False).input_ids[-1]
        assert tokenizer.convert_ids_to_tokens(written) == character
        assert BackOff(table[kind]).lookup(character.encode()) == (written, "same bytes")


@each("kind", tiny.KINDS)
def test_back_off_is_then_the_first_token_in_the_middle_of_a_text(table: dict[str, TokenBytes], kind: str) -> None:
    """Against the encoding of the text after a character that merges with nothing; no dummy prefix, never unk."""
    tokenizer, pieces = table[kind].tokenizer, set(table[kind].pieces)
    before = tokenizer("\x01", add_special_tokens=False).input_ids
    for text in ("qzx", " thezz", "zthe", "\u00f0\u00f0", "日京", "  the", "𝄞!"):
        assert text.encode() not in pieces
        middle = tokenizer("\x01" + text, add_special_tokens=False).input_ids
        assert middle[: len(before)] == before
        assert BackOff(table[kind]).lookup(text.encode()) == (middle[len(before)], "first token"), text


@each("kind", tiny.KINDS)
def test_bytes_that_are_no_text_take_the_longest_token_that_begins_them(
    table: dict[str, TokenBytes], kind: str
) -> None:
    tokens = table[kind]
    by_name = sorted(tokens.tokenizer.get_vocab().items(), key=lambda item: not item[0].startswith("<0x"))
    spelt = {tokens[token]: token for _, token in by_name if token not in tokens.special}  # byte tokens yield
    for data in (b"\xe6\x97", b"the\xff", b"\xc3\xb6\xff", b"\xf0\x9f"):
        longest = next(data[:size] for size in range(len(data), 0, -1) if data[:size] in spelt)
        how = "same bytes" if longest == data else "longest prefix"
        assert BackOff(tokens).lookup(data) == (spelt[longest], how), data


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
    for data in (b"zz", b"\xff", b"</s>", b"<unk>", b""):
        assert back_off.lookup(data) == (TAIL, "tail"), data
    assert back_off.lookup(b"ab")[0] == 2


@given(data=st.binary(max_size=8))
def test_a_back_off_token_always_begins_the_bytes(tokenizers: dict[str, Any], data: bytes) -> None:
    for kind in tiny.KINDS:
        tokens = TokenBytes(tokenizers[kind])
        found, how = BackOff(tokens).lookup(data)
        assert (found == TAIL) == (how == "tail") == (not data)
        if found != TAIL:
            assert data.startswith(tokens[found])
            assert tokens[found]
            assert found not in tokens.special


def test_a_pre_tokenizer_that_leaves_nothing_of_the_bytes_is_no_error() -> None:
    from tokenizers import pre_tokenizers

    pivot = toy("a", "\n")
    pivot.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    token, how = BackOff(pivot).lookup(b"\n\n")
    assert token == 1
    assert how in ("first token", "longest prefix")


# -- edit distance ------------------------------------------------------------------------------------------------------


def naive_nearest(pivot: TokenBytes, data: bytes) -> int:
    """The lowest id among the tokens with the smallest distance; a byte's own token only where no other is spelt like it."""
    ordinary = {pivot[token] for token in range(len(pivot)) if not pivot.is_byte(token) and token not in pivot.special}
    best, least = TAIL, float("inf")
    for token in range(len(pivot)):
        spelt = pivot[token]
        if token in pivot.special or not spelt or (pivot.is_byte(token) and spelt in ordinary):
            continue
        distance = edit_distance(surface(data), surface(spelt))
        if distance < least:
            best, least = token, distance
    return best


@each("kind", tiny.KINDS)
@given(
    several=st.lists(
        st.text("the qzß日", min_size=1, max_size=6).map(str.encode) | st.binary(min_size=1, max_size=3), max_size=3
    )
)
def test_edit_is_the_first_token_with_the_smallest_distance(
    table: dict[str, TokenBytes], kind: str, several: list[bytes]
) -> None:
    found = BackOff(table[kind]).nearest(several)
    assert [token for token, _ in found] == [naive_nearest(table[kind], data) for data in several]


def test_edit_is_computed_part_by_part_for_large_vocabularies(
    table: dict[str, TokenBytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [b"qz", b" the", b"", b" thf", b" tzz", b"\xe6\x97"]
    whole = BackOff(table["llama"]).nearest(several)
    monkeypatch.setattr("fusechat.align.back_off._CELLS", 2)
    assert BackOff(table["llama"]).nearest(several) == whole
    assert whole[1][1] == "same bytes"
    assert whole[2] == (TAIL, "tail")
    assert {how for _, how in (whole[0], *whole[3:5])} == {EDIT}


def test_edit_never_takes_a_special_token_and_of_equals_the_lowest() -> None:
    pivot = toy("xab", "ab", "abx", "zzzz", special=("</s>", "<q>"))
    back_off = BackOff(pivot)
    assert back_off.nearest([b"<q>", b"</s>", b"xabx", b"abxx", b"ab"]) == [
        (0, EDIT),  # three letters to replace, as in `ab` and one to put in, and in `abx`
        (0, EDIT),  # four, as in `zzzz`
        (0, EDIT),
        (2, EDIT),
        (1, "same bytes"),
    ]
