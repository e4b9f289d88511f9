"""The bytes that tokens stand for: by the decoder's alphabet, for every id, and without the tokenizer once pickled."""

import json
import pickle

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from cases import each
from fusechat.errors import ModelError
from fusechat.models.token_bytes import TokenBytes, token_bytes
from test_spans import QUICKSTART, REAL, by_name, naive_bytes


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@each("name", [*tiny.KINDS, *REAL, *QUICKSTART])
def test_the_bytes_of_every_token(name: str) -> None:
    table = token_bytes(by_name(name))
    assert len(table) == len(by_name(name)) == len(table.pieces)
    assert table.lengths.dtype == np.int32
    assert table.lengths.tolist() == [len(data) for data in table.pieces]
    assert table[len(table) + 3] == b"", "an id past the tokenizer's"
    for token in range(0, len(table), max(1, len(table) // 2000)):
        expected = naive_bytes(by_name(name), token)
        if not table.byte_level:  # an added token of space marks, which the model writes for spaces too
            expected = expected.replace("▁".encode(), b" ")
        assert table[token] == table.pieces[token] == expected


def test_an_id_that_no_piece_has_stands_for_nothing_and_the_ids_after_it_for_theirs() -> None:
    table = TokenBytes(wrapped(Tokenizer(models.WordLevel({"a": 0, "b": 4}, unk_token="a"))))
    assert table.pieces == [b"a", b"", b"", b"", b"b"]


def test_a_byte_tokens_name_without_byte_fallback_is_text() -> None:
    table = TokenBytes(wrapped(Tokenizer(models.WordLevel({"<0x41>": 0, "<0xZZ>": 1}, unk_token="<0x41>"))))
    assert table.pieces == [b"<0x41>", b"<0xZZ>"]


def test_byte_tokens_are_those_of_byte_fallback() -> None:
    table = token_bytes(by_name("mistral"))
    assert len(table.byte_tokens) == 256
    assert sorted(table[token] for token in table.byte_tokens) == [bytes([byte]) for byte in range(256)]
    assert table.is_byte(by_name("mistral").convert_tokens_to_ids("<0x41>"))
    assert not table.is_byte(by_name("mistral").convert_tokens_to_ids("▁"))
    assert token_bytes(by_name("llama")).byte_tokens == frozenset()


@each("kind", tiny.KINDS)
def test_a_pickled_table_has_the_bytes_and_no_tokenizer(kind: str) -> None:
    table = TokenBytes(tiny.tokenizer_of(kind))
    table.tokenizer.name_or_path = "some/model"
    copy = pickle.loads(pickle.dumps(TokenBytes(table.tokenizer)))
    assert copy.tokenizer is None
    assert copy.pieces == table.pieces
    assert copy.lengths.tolist() == table.lengths.tolist()
    assert (copy.special, copy.byte_tokens, len(copy)) == (table.special, table.byte_tokens, len(table))
    assert copy.name == "some/model"
    assert copy.added.keys() == table.added.keys()
    assert copy.piece(" é") == table.piece(" é")


def test_special_tokens_are_the_tokenizers_own_and_those_marked_so() -> None:
    tokenizer = tiny.tokenizer_of("llama")
    tokenizer.add_tokens([AddedToken("<call>"), AddedToken("<tool>", special=True)])
    table = TokenBytes(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<tool>") in table.special
    assert tokenizer.convert_tokens_to_ids("<call>") not in table.special
    assert set(tokenizer.all_special_ids) <= table.special
    assert tokenizer.convert_tokens_to_ids("<call>") in table.added


def test_a_piece_outside_the_byte_alphabet_stands_for_itself_as_in_the_decoder() -> None:
    backend = Tokenizer(models.BPE(vocab={"Ġa": 0, "Ġ日": 1, "é": 2, "a b": 3}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    assert TokenBytes(wrapped(backend)).pieces == [b" a", "Ġ日".encode(), b"\xe9", b"a b"]
    assert backend.decoder.decode(["Ġ日"]) == "Ġ日"


def test_an_added_tokens_bytes_are_its_text_whatever_the_alphabet() -> None:
    tokenizer = tiny.tokenizer_of("llama")
    tokenizer.add_tokens(["<é>", "Ġ"])
    assert TokenBytes(tokenizer)[len(tokenizer) - 1] == "<é>".encode()  # the other is a piece of the model


def test_marks_of_word_parts_are_no_bytes() -> None:
    pieces = TokenBytes(wrapped(Tokenizer(models.WordPiece({"do": 0, "##ing": 1, "[UNK]": 2})))).pieces
    assert pieces == [b"do", b"ing", b"[UNK]"]
    model = models.BPE(vocab={"do": 0, "ing</w>": 1}, merges=[], end_of_word_suffix="</w>")
    assert TokenBytes(wrapped(Tokenizer(model))).pieces == [b"do", b"ing"]


def test_a_metaspace_may_have_a_character_of_its_own() -> None:
    backend = Tokenizer(models.WordLevel({"_a": 0, "▁a": 1}, unk_token="_a"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_")
    backend.decoder = decoders.Metaspace(replacement="_")
    table = TokenBytes(wrapped(backend))
    assert table.pieces == [b" a", "▁a".encode()]
    assert table.piece(" a") == "_a"


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(ModelError, match=r"some/model.*tokenizer\.json"):
        token_bytes(Slow())


def test_the_kind_of_a_tokenizer_is_its_decoders_not_its_vocabularys() -> None:
    """A Ġ in a SentencePiece vocabulary is an ordinary character; a ▁ in a byte-level one is three bytes."""
    state = json.loads(by_name("mistral").backend_tokenizer.to_str())
    size = max(state["model"]["vocab"].values()) + 1
    state["model"]["vocab"]["Ġthe"] = size
    table = token_bytes(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))))
    assert table[size] == "Ġthe".encode()
    byte_level = by_name("llama")
    assert b"".join(token_bytes(byte_level)[token] for token in byte_level("▁").input_ids) == "▁".encode()
