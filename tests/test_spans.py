"""Byte spans of tokens: worked examples, the tiling law on arbitrary text, and the fallback to character offsets."""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from fusechat.align import token_spans
from fusechat.core.spans import encode_with_spans, token_bytes
from fusechat.errors import ModelError

SHARED = Path(__file__).parents[2] / "shared" / "tokenizers"
REAL = ("internlm2", "mistral_v1", "nh2_solar", "openchat_3_5", "qwen1_5")
KEEPING = [*tiny.KINDS, *REAL[:4]]  # tokenizers that keep every text as it is
FEW = settings(max_examples=40, deadline=None)

PIECES = [
    *("Hello", " world", "  ", "   x", "\t", "\r\n", "\n\n", "2024", "3.14", "▁", "Ġ", "<0x41>", "Ċ", "ﬁ", "Ａ"),
    *("日本語", "你好，", "한국어", "👍🏽", "👩‍👩‍👧", "🏳️‍🌈", "שלום", "مرحبا"),
    *("e\u0301", "a\u0323\u0307", "\u1100\u1161\u11a8"),
    *("\u200f", "\x00", "\x1b", "\x7f", "\u00a0", "\u3000", "\ufeff", "\ufffd", "𝄞", "\U0010ffff"),
    *("<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>", "<eos>", "<bos>", "<pad>"),
    *("<|endoftext|>", "<|end_of_turn|>"),
]
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@lru_cache
def by_name(name: str) -> Any:
    """A tiny tokenizer, or a real vocabulary where those are at hand."""
    if name in tiny.KINDS:
        return tiny.tokenizer_of(name)
    if not (SHARED / name / "tokenizer.json").is_file():
        pytest.skip(f"the real vocabulary of {name} is not at hand")
    return PreTrainedTokenizerFast(tokenizer_file=str(SHARED / name / "tokenizer.json"))


def assert_monotone(spans: np.ndarray) -> None:
    assert spans.dtype == np.int64
    assert spans.ndim == 2
    assert (spans[:, 0] <= spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all()


def assert_tiles(spans: np.ndarray, size: int) -> None:
    """Every byte is covered once, and spans without width stand between those with one."""
    assert_monotone(spans)
    edges = [0, *spans[:, 1].tolist()]
    assert spans[:, 0].tolist() == edges[:-1]
    assert edges[-1] == size


def naive_bytes(tokenizer: Any, token: int) -> bytes:
    """A token's bytes, by its spelling and what one knows about the kinds of tokenizer here."""
    if token in tokenizer.added_tokens_decoder:
        return str(tokenizer.added_tokens_decoder[token].content).encode()
    piece = tokenizer.convert_ids_to_tokens(token)
    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        return bytes(BYTE_OF[character] for character in piece)
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return str(piece).replace("▁", " ").encode()


def _gpt2_alphabet() -> dict[str, int]:
    """As in GPT-2's `bytes_to_unicode`: bytes without a printable Latin-1 form are numbered from U+0100 on."""
    table, extra = {}, 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            table[chr(byte)] = byte
        else:
            table[chr(256 + extra)] = byte
            extra += 1
    return table


BYTE_OF = _gpt2_alphabet()


def spelt_like_a_piece(name: str, text: str) -> bool:
    """Whether the text holds a token's spelling that stands for other bytes: then spans come from the offsets."""
    return ("▁" in text and name != "llama") or (name == "gemma" and re.search("<0x[0-9A-F]{2}>", text) is not None)


@pytest.mark.parametrize("name", KEEPING)
@FEW
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text="  two leading spaces")
@example(text="▁▁")
@example(text="a<0x00>b")
@example(text="a</s> b<|im_end|>  c")
def test_spans_tile_the_text_and_hold_each_tokens_bytes(name: str, text: str) -> None:
    tokenizer = by_name(name)
    data = text.encode()
    encoded = encode_with_spans(tokenizer, text)
    assert encoded.ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert_tiles(encoded.spans, len(data))
    if spelt_like_a_piece(name, text):
        return
    assert encoded.exact
    for token, (begin, end) in zip(encoded.ids.tolist(), encoded.spans.tolist(), strict=True):
        assert naive_bytes(tokenizer, token).endswith(data[begin:end])
        assert len(naive_bytes(tokenizer, token)) - (end - begin) in (0, 1)  # one less: a dummy prefix


@pytest.mark.parametrize("name", [*tiny.KINDS, *REAL])
@pytest.mark.parametrize("text", ["Hello, world! 12", "日本 👍🏽", "x</s> y <|im_end|>z"])
def test_spans_cut_the_text_into_what_the_tokens_decode_to(name: str, text: str) -> None:
    """Where tokens hold whole characters, a token's part of the text is what Transformers' own decoder makes of it."""
    tokenizer = by_name(name)
    encoded = encode_with_spans(tokenizer, text)
    data = text.encode()
    for index, (begin, end) in enumerate(encoded.spans.tolist()):
        decoded = tokenizer.decode(encoded.ids[: index + 1].tolist(), clean_up_tokenization_spaces=False)
        if "�" not in decoded and "</s>" not in text:
            assert decoded.encode() == data[:end], (begin, end)


@FEW
@given(text=TEXTS)
@example(text="e\u0301")
@example(text="\u0301")
@example(text="a\u0323\u0307\u0323")
@example(text="Å Å \u212b")
@example(text="\u1100\u1161")
@example(text="<|im_end|>e\u0301<|im_end|>")
def test_a_tokenizer_that_normalises_covers_every_byte(text: str) -> None:
    encoded = encode_with_spans(by_name("qwen1_5"), text)
    if len(encoded.ids):
        assert_tiles(encoded.spans, len(text.encode()))


def test_nfc_falls_back_to_offsets_and_says_so() -> None:
    tokenizer = by_name("qwen1_5")
    assert encode_with_spans(tokenizer, "caf\u00e9").exact
    assert not encode_with_spans(tokenizer, "cafe\u0301").exact


def nfc_tokenizer() -> PreTrainedTokenizerFast:
    """NFC, then one token a character."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "é": 3, " ": 4}, unk_token="<unk>"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_offsets_give_a_composed_character_all_bytes_that_it_came_from() -> None:
    encoded = encode_with_spans(nfc_tokenizer(), "ae\u0301b")
    assert encoded.ids.tolist() == [1, 3, 2]
    assert not encoded.exact
    assert encoded.spans.tolist() == [[0, 1], [1, 4], [4, 5]]


def whitespace_dropping_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_bytes_that_no_token_covers_go_to_the_token_before() -> None:
    spans = token_spans(whitespace_dropping_tokenizer(), "  one \t two ")
    assert spans.tolist() == [[0, 8], [8, 12]]  # at the start: to the first


def test_an_unknown_character_has_its_own_bytes_not_those_of_unk() -> None:
    spans = token_spans(whitespace_dropping_tokenizer(), "one 日 two")
    assert spans.tolist() == [[0, 4], [4, 8], [8, 11]]


# -- worked examples ----------------------------------------------------------------------------------------------------


def spelt(name: str, text: str) -> list[tuple[str, int, int]]:
    encoded = encode_with_spans(by_name(name), text)
    pieces = by_name(name).convert_ids_to_tokens(encoded.ids.tolist())
    return [(piece, begin, end) for piece, (begin, end) in zip(pieces, encoded.spans.tolist(), strict=True)]


def test_byte_level_splits_a_character_over_several_tokens() -> None:
    assert spelt("llama", "本x") == [("æ", 0, 1), ("ľ", 1, 2), ("¬", 2, 3), ("x", 3, 4)]


def test_byte_fallback_tokens_are_a_byte_each_and_the_dummy_prefix_is_empty() -> None:
    found = spelt("mistral", "本x")
    assert found == [("▁", 0, 0), ("<0xE6>", 0, 1), ("<0x9C>", 1, 2), ("<0xAC>", 2, 3), ("x", 3, 4)]


def test_a_dummy_prefix_that_merged_with_a_word_leaves_the_word() -> None:
    assert spelt("mistral", "the") == [("▁the", 0, 3)]
    assert spelt("mistral", " the") in (
        [("▁", 0, 0), ("▁the", 0, 4)],
        [("▁▁", 0, 1), ("the", 1, 4)],
    )


def test_without_a_dummy_prefix_a_leading_space_is_the_tokens_own() -> None:
    assert spelt("gemma", " the") == [("▁the", 0, 4)]


def test_a_text_after_an_added_token_gets_a_dummy_prefix_again() -> None:
    assert spelt("mistral", "x</s>the") == [("▁", 0, 0), ("x", 0, 1), ("</s>", 1, 5), ("▁the", 5, 8)]
    assert spelt("mistral", "</s></s>") == [("</s>", 0, 4), ("</s>", 4, 8)]


def test_special_tokens_written_in_the_text_have_spans_like_any_other() -> None:
    assert spelt("llama", "x<|im_end|>x") == [("x", 0, 1), ("<|im_end|>", 1, 11), ("x", 11, 12)]
    assert spelt("gemma", "本<eos>x") == [("本", 0, 3), ("<eos>", 3, 8), ("x", 8, 9)]


def test_a_byte_tokens_spelling_written_in_the_text_is_text() -> None:
    assert spelt("mistral", "<0x41>")[-1][2] == 6
    assert "".join(piece for piece, _, _ in spelt("llama", "<0x41>")) == "<0x41>"


def metaspace_always() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁ab", -1.0), ("c", -1.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_metaspace_that_prepends_only_where_no_space_is() -> None:
    assert token_spans(metaspace_always(), "abc").tolist() == [[0, 2], [2, 3]]
    assert token_spans(metaspace_always(), " abc").tolist() == [[0, 3], [3, 4]]


def test_an_added_token_that_swallows_spaces_covers_them() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("<x>", rstrip=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_spans(tokenizer, "a<x>  b").tolist() == [[0, 1], [1, 6], [6, 7]]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ModelError, match="half a surrogate pair at character 2"):
        token_spans(by_name("llama"), "ab\ud800c")


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(ModelError, match=r"some/model.*tokenizer\.json"):
        token_spans(Slow(), "text")


def test_the_kind_of_a_tokenizer_is_its_decoders_not_its_vocabularys() -> None:
    """A Ġ in a SentencePiece vocabulary is an ordinary character; a ▁ in a byte-level one is three bytes."""
    state = json.loads(by_name("mistral").backend_tokenizer.to_str())
    size = max(state["model"]["vocab"].values()) + 1
    state["model"]["vocab"]["Ġthe"] = size
    table = token_bytes(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))))
    assert table[size] == "Ġthe".encode()
    assert spelt("llama", "▁")[-1][2] == 3


@pytest.mark.parametrize("name", [*tiny.KINDS, *REAL])
def test_the_bytes_of_every_token(name: str) -> None:
    table = token_bytes(by_name(name))
    step = max(1, len(table) // 2000)
    for token in range(0, len(table), step):
        assert table[token] == naive_bytes(by_name(name), token)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_id_past_the_tokenizers_stands_for_nothing(kind: str) -> None:
    assert token_bytes(by_name(kind))[len(by_name(kind)) + 3] == b""
