"""Byte spans for every family of fast tokenizer in use, each built here: those that keep a text give every token its bytes,
those that change it cover the text and fall back to offsets only where they changed it."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from cases import FEW, each
from fusechat.models.spans import encode_with_spans
from test_spans import TEXTS, assert_own_bytes, assert_tiles, stands_for

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ADDED = [
    AddedToken("<|r|>", rstrip=True, normalized=False),
    AddedToken("<|l|>", lstrip=True, normalized=False),
    AddedToken("<|lr|>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("<|n|>", normalized=False),
]
SPACED = st.lists(
    st.sampled_from(
        [token.content for token in ADDED]
        + [" ", "  ", "\n", "\u3000", "\t", "the", "本", "👍🏽", " a", "▁", "word", "sword", "<plain>", "é"]
    ),
    max_size=12,
).map("".join)


def like(kind: str) -> Tokenizer:
    """A copy of a tiny tokenizer, to be changed."""
    return Tokenizer.from_str(tiny.tokenizer_of(kind).backend_tokenizer.to_str())


def byte_level(pre_tokenizer: Any, **parts: Any) -> Tokenizer:
    backend = like("llama")
    backend.pre_tokenizer = pre_tokenizer
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def llama_3(**parts: Any) -> Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    return byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), **parts
    )


def metaspace(scheme: str, *, split: bool) -> Tokenizer:
    backend = like("mistral")
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return backend


def llama_2_by_metaspace_decoder() -> Tokenizer:
    backend = metaspace("always", split=True)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return backend


def gemma() -> Tokenizer:
    """Spaces are replaced and never split at; runs of them and of line feeds are added tokens."""
    backend = like("mistral")
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(content, normalized=False) for content in ("\n", "\n\n", "▁▁", "<table>")])
    return backend


def unigram(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """Without byte fallback: what it does not know is `<unk>`."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        tiny.LINES,
        trainers.UnigramTrainer(vocab_size=230, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    if normalizer is not None:
        trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizer
    trained.decoder = decoders.Metaspace()
    return trained


@lru_cache
def charsmap() -> bytes:
    """The table by which SentencePiece does its own NFKC."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.LINES), model_writer=model, vocab_size=230, minloglevel=2
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return bytes(proto.normalizer_spec.precompiled_charsmap)


def xlm_roberta() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap()), normalizers.Replace(Regex(" {2,}"), " ")])
    return unigram(normalizer, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]))


def t5() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap()), normalizers.Strip(left=False, right=True)])
    return unigram(normalizer, pre_tokenizers.Metaspace())


def bert() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        tiny.LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    )
    backend.decoder = decoders.WordPiece()
    return backend


def clip() -> Tokenizer:
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(
        tiny.LINES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False),
    )
    backend.decoder = decoders.BPEDecoder()
    return backend


TRIMMED = processors.ByteLevel(trim_offsets=True)  # offsets without leading spaces
KEEPING: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), post_processor=TRIMMED),
    "roberta": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), post_processor=TRIMMED),
    "llama-3": llama_3,
    **{
        f"metaspace {scheme} {split}": lambda scheme=scheme, split=split: metaspace(scheme, split=split)
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "metaspace decoder": llama_2_by_metaspace_decoder,
    "gemma": gemma,
    "llama-2": lambda: like("mistral"),
    "unigram": lambda: like("gemma"),
}
CHANGING: dict[str, Callable[[], Tokenizer]] = {
    "nfc": lambda: llama_3(normalizer=normalizers.NFC()),
    "lowercase": lambda: llama_3(normalizer=normalizers.Lowercase()),
    "nfkc trimmed": lambda: byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=True), normalizer=normalizers.NFKC(), post_processor=TRIMMED
    ),
    "strip": lambda: byte_level(pre_tokenizers.ByteLevel(), normalizer=normalizers.Strip()),
    "digits": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()])
    ),
    "unigram without bytes": lambda: unigram(None, pre_tokenizers.Metaspace()),
    "xlm-roberta": xlm_roberta,
    "t5": t5,
    "bert": bert,
    "clip": clip,
}


@lru_cache
def family(name: str, *, added: bool = False) -> PreTrainedTokenizerFast:
    backend = {**KEEPING, **CHANGING}[name]()
    if added:
        backend.add_special_tokens(ADDED)
        backend.add_tokens([AddedToken("word", single_word=True, normalized=False), AddedToken("<plain>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def both(names: Iterable[str]) -> list[tuple[str, bool]]:
    """With added tokens and without; line feeds that are tokens, and space that another token swallows, are nowhere together."""
    return [(name, added) for name in names for added in (False, True) if (name, added) != ("gemma", True)]


@each("name, added", both(KEEPING))
@FEW
@given(text=st.one_of(TEXTS, SPACED))
@example(text="  <|r|>  <|r|> \n <|l|>  <|l|><|lr|>  ")
@example(text=" a<|r|>▁<0x41> <0x3C>")
@example(text="  ﬁ e\u0301  İ ℡ ① ")
def test_a_tokenizer_that_keeps_the_text_gives_every_token_its_bytes(name: str, added: bool, text: str) -> None:
    tokenizer = family(name, added=added)
    assert encode_with_spans(tokenizer, text).ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert_own_bytes(tokenizer, text)


@each("name, added", both(CHANGING))
@FEW
@given(text=st.one_of(TEXTS, SPACED))
@example(text="  ﬁ e\u0301  İ ℡ ① ")
def test_spans_cover_every_byte_once_whatever_becomes_of_the_text(name: str, added: bool, text: str) -> None:
    encoded = encode_with_spans(family(name, added=added), text)
    assert encoded.ids.tolist() == family(name, added=added)(text, add_special_tokens=False).input_ids
    if len(encoded.ids):
        assert_tiles(encoded.spans, len(text.encode()))


# What stands between bars, which no tokenizer here joins to a word, and which of it nothing changes.
SAME = ["the", "👍🏽", "👩‍👩‍👧", "本", "a b", "dog", "é", "مرحبا", "12"]
CHANGED = ["e\u0301", "ﬁ", "①", "\u1100\u1161", "㌔", "Ａ", "ŉ", "\u212b"]


@each("name", CHANGING)
@FEW
@given(parts=st.lists(st.sampled_from(SAME + CHANGED), max_size=9))
@example(parts=["ﬁ", "👍🏽", "①", "👍🏽"])
def test_only_what_the_tokenizer_changes_is_taken_from_offsets(name: str, parts: list[str]) -> None:
    tokenizer, data = family(name), "|".join(parts).encode()
    encoded = encode_with_spans(tokenizer, data.decode())
    dropped = b" " if "Whitespace" in str(tokenizer.backend_tokenizer.pre_tokenizer) or name == "bert" else b""
    ends = np.cumsum([len(part.encode()) + 1 for part in parts])
    for part, stop in zip(parts, ends.tolist(), strict=True):
        inside = (encoded.spans[:, 0] >= stop - 1 - len(part.encode())) & (encoded.spans[:, 1] < stop)
        for token, (begin, end) in zip(encoded.ids[inside].tolist(), encoded.spans[inside].tolist(), strict=True):
            unknown = tokenizer.convert_ids_to_tokens(token) in ("<unk>", "[UNK]")
            assert part in CHANGED or unknown or stands_for(tokenizer, token, data[begin:end].removesuffix(dropped))
