"""Byte spans of tokens: worked examples, the tiling law on arbitrary text, and the fallback to character offsets."""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import paper
import tiny
from cases import FEW, each
from fusechat.align import token_spans
from fusechat.errors import ModelError
from fusechat.models.spans import encode_with_spans
from fusechat.run.cache import cache_directory
from texts import PIECES

REAL = ("internlm2", "openchat_3_5", "qwen1_5")
QUICKSTART = {"SmolLM2": "llama", "Gemma 3": "gemma3_text"}  # the architectures that their converted directories name
KEEPING = [*tiny.KINDS, *REAL[:2], *QUICKSTART]  # tokenizers that keep every text as it is
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@lru_cache
def by_name(name: str) -> Any:
    """A tiny tokenizer, one like a real model's, or one of the quickstart's two, where those are at hand."""
    if name in (*tiny.KINDS, *REAL):
        return tiny.tokenizer_of(name) if name in tiny.KINDS else paper.vocabulary(name)
    for config in cache_directory().glob("converted/*/config.json"):
        if json.loads(config.read_text())["model_type"] == QUICKSTART[name]:
            return PreTrainedTokenizerFast(tokenizer_file=str(config.with_name("tokenizer.json")))
    return pytest.skip(f"{name} of the quickstart is not in the cache")


def assert_tiles(spans: np.ndarray, size: int) -> None:
    """Every byte is covered once, and spans without width stand between those with one."""
    assert (spans.dtype, spans.ndim) == (np.int64, 2)
    assert (spans[:, 0] <= spans[:, 1]).all()
    edges = [0, *spans[:, 1].tolist()]
    assert spans[:, 0].tolist() == edges[:-1]
    assert edges[-1] == size


@lru_cache(maxsize=64)
def added_tokens(tokenizer: Any) -> dict[int, bytes]:
    return {token: str(added.content).encode() for token, added in tokenizer.added_tokens_decoder.items()}


def naive_bytes(tokenizer: Any, token: int) -> bytes:
    """A token's bytes, by its spelling and what one knows about the kinds of tokenizer here."""
    if token in added_tokens(tokenizer):
        return added_tokens(tokenizer)[token]
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


def stands_for(tokenizer: Any, token: int, part: bytes) -> bool:
    """Whether a token may stand for this part of a text, be it less a dummy prefix, or with space around an added token."""
    own = naive_bytes(tokenizer, token).removeprefix(b"##").removesuffix(b"</w>")
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):  # there a space mark is as good as a space
        own, part = own.replace("▁".encode(), b" "), part.replace("▁".encode(), b" ")
    if token in added_tokens(tokenizer) and own.strip():
        return part.decode().strip() == own.decode().strip()
    return part in (own, own.removeprefix(b" "), tokenizer.convert_ids_to_tokens(token).encode())


def assert_own_bytes(tokenizer: Any, text: str) -> None:
    """The spans tile the text, and every token stands for the bytes of its own."""
    encoded, data = encode_with_spans(tokenizer, text), text.encode()
    assert encoded.exact
    assert_tiles(encoded.spans, len(data))
    for token, (begin, end) in zip(encoded.ids.tolist(), encoded.spans.tolist(), strict=True):
        assert stands_for(tokenizer, token, data[begin:end]), (token, begin, end)


@each("name", KEEPING)
def test_spans_tile_the_text_and_hold_each_tokens_bytes(name: str) -> None:
    tokenizer = by_name(name)
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    unknown = {BYTE_OF[letter] for letter in BYTE_OF.keys() - tokenizer.get_vocab().keys()} if byte_level else set()

    @FEW
    @given(
        text=TEXTS.filter(lambda text: not unknown & {*text.encode()})
    )  # SmolLM2 has no token for some bytes, and drops them
    @example(text="")
    @example(text=" ")
    @example(text="  two leading spaces")
    @example(text="▁▁")
    @example(text="a<0x00>b")
    @example(text="a</s> b<|im_end|>  c")
    def law(text: str) -> None:
        assert encode_with_spans(tokenizer, text).ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        assert_own_bytes(tokenizer, text)

    law()


@each("name", [*tiny.KINDS, *REAL])
def test_spans_cut_the_text_into_what_the_tokens_decode_to(name: str) -> None:
    """Where tokens hold whole characters, a token's part of the text is what Transformers' own decoder makes of it."""
    tokenizer = by_name(name)
    for text in ("Hello, world! 12", "日本 👍🏽", "x <|im_end|>z"):
        encoded = encode_with_spans(tokenizer, text)
        for index, (begin, end) in enumerate(encoded.spans.tolist()):
            decoded = tokenizer.decode(encoded.ids[: index + 1].tolist(), clean_up_tokenization_spaces=False)
            assert "�" in decoded or decoded.encode() == text.encode()[:end], (text, begin, end)


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


def test_only_the_composed_character_is_taken_from_offsets() -> None:
    """The emoji before and after it, each several tokens, are as exact as ever."""
    tokenizer, text = by_name("qwen1_5"), "👨🏿‍🚀 cafe\u0301 <|im_end|>👨🏿‍🚀"
    encoded, data = encode_with_spans(tokenizer, text), text.encode()
    for token, (begin, end) in zip(encoded.ids.tolist(), encoded.spans.tolist(), strict=True):
        part = data[begin:end]
        assert stands_for(tokenizer, token, part) or part.endswith("e\u0301".encode())
    assert sum(data[begin:end].endswith("e\u0301".encode()) for begin, end in encoded.spans.tolist()) == 1


def wrapped(words: list[str], pre_tokenizer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    """A token for each of the words, the first of which is `<unk>`."""
    backend = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_offsets_give_a_composed_character_all_bytes_that_it_came_from() -> None:
    characters = pre_tokenizers.Split("", "isolated")
    composed = wrapped(["<unk>", "a", "b", "é", " "], characters, normalizer=normalizers.NFC(), decoder=decoders.Fuse())
    encoded = encode_with_spans(composed, "ae\u0301b")
    assert encoded.ids.tolist() == [1, 3, 2]
    assert not encoded.exact
    assert encoded.spans.tolist() == [[0, 1], [1, 4], [4, 5]]


def dropping_spaces() -> PreTrainedTokenizerFast:
    return wrapped(["<unk>", "one", "two"], pre_tokenizers.Whitespace())


def test_bytes_that_no_token_covers_go_to_the_token_before() -> None:
    spans = token_spans(dropping_spaces(), "  one \t two ")
    assert spans.tolist() == [[0, 8], [8, 12]]  # at the start: to the first


def test_an_unknown_character_has_its_own_bytes_not_those_of_unk() -> None:
    spans = token_spans(dropping_spaces(), "one 日 two")
    assert spans.tolist() == [[0, 4], [4, 8], [8, 11]]


# -- worked examples ----------------------------------------------------------------------------------------------------


def spelt(name: str, text: str) -> list[tuple[str, int, int]]:
    encoded = encode_with_spans(by_name(name), text)
    pieces = by_name(name).convert_ids_to_tokens(encoded.ids.tolist())
    return [(piece, begin, end) for piece, (begin, end) in zip(pieces, encoded.spans.tolist(), strict=True)]


@each("name, text, expected", [
    # byte-level tokens split a character
    ("llama", "本x", [("æ", 0, 1), ("ľ", 1, 2), ("¬", 2, 3), ("x", 3, 4)]),
    # byte-fallback tokens are a byte each, and the dummy prefix is empty; where it merged with a word, it leaves the word
    ("mistral", "本x", [("▁", 0, 0), ("<0xE6>", 0, 1), ("<0x9C>", 1, 2), ("<0xAC>", 2, 3), ("x", 3, 4)]),
    ("mistral", "the", [("▁the", 0, 3)]),
    # without a dummy prefix a leading space is the token's own
    ("gemma", " the", [("▁the", 0, 4)]),
    # after an added token there is a dummy prefix again
    ("mistral", "x</s>the", [("▁", 0, 0), ("x", 0, 1), ("</s>", 1, 5), ("▁the", 5, 8)]),
    ("mistral", "</s></s>", [("</s>", 0, 4), ("</s>", 4, 8)]),
    # special tokens written in the text are like any other
    ("llama", "x<|im_end|>x", [("x", 0, 1), ("<|im_end|>", 1, 11), ("x", 11, 12)]),
    ("gemma", "本<eos>x", [("本", 0, 3), ("<eos>", 3, 8), ("x", 8, 9)]),
])  # fmt: skip
def test_spans_by_hand(name: str, text: str, expected: list[tuple[str, int, int]]) -> None:
    assert spelt(name, text) == expected


def test_a_dummy_prefix_before_a_space_is_empty_or_has_it() -> None:
    assert spelt("mistral", " the") in ([("▁", 0, 0), ("▁the", 0, 4)], [("▁▁", 0, 1), ("the", 1, 4)])


def test_a_byte_tokens_spelling_written_in_the_text_is_text() -> None:
    assert spelt("mistral", "<0x41>")[-1][2] == 6
    assert "".join(piece for piece, _, _ in spelt("llama", "<0x41>")) == "<0x41>"


def test_metaspace_that_prepends_only_where_no_space_is() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁ab", -1.0), ("c", -1.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_spans(tokenizer, "abc").tolist() == [[0, 2], [2, 3]]
    assert token_spans(tokenizer, " abc").tolist() == [[0, 3], [3, 4]]


def test_an_added_token_that_swallows_spaces_covers_them() -> None:
    tokenizer = wrapped(["<unk>", "a", "b"], pre_tokenizers.Whitespace())
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<x>", rstrip=True)])
    assert token_spans(tokenizer, "a<x>  b").tolist() == [[0, 1], [1, 6], [6, 7]]


def test_a_text_that_is_all_dropped_has_no_tokens() -> None:
    encoded = encode_with_spans(dropping_spaces(), " \t\r\n")
    assert (encoded.ids.shape, encoded.spans.shape) == ((0,), (0, 2))
    assert not encoded.exact


def test_truncation_and_padding_that_the_file_asks_for_are_left_out() -> None:
    tokenizer = tiny.tokenizer_of("llama")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert_own_bytes(tokenizer, "The quick brown fox jumps over the lazy dog.")


def test_tokens_added_after_the_first_text_are_seen() -> None:
    tokenizer = tiny.tokenizer_of("mistral")
    assert_own_bytes(tokenizer, "the<new>")
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    assert token_spans(tokenizer, "the<new>").tolist() == [[0, 3], [3, 8]]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ModelError, match="half a surrogate pair at character 2"):
        token_spans(by_name("llama"), "ab\ud800c")


def test_bytes_that_a_byte_level_vocabulary_lacks_go_to_a_token_beside_them() -> None:
    """As SmolLM2's, which has none for 0xF1."""
    backend = Tokenizer(models.BPE({letter: token for token, letter in enumerate("aðŁ")}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    encoded = encode_with_spans(PreTrainedTokenizerFast(tokenizer_object=backend), "a\U0001f642a")  # F0 9F 99 82
    assert encoded.ids.tolist() == [0, 1, 2, 0]
    assert not encoded.exact
    assert_tiles(encoded.spans, 6)
