"""Tokenizers of three kinds, trained on text of the skills, and the chat templates of the paper's six models in short."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

OPENCHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    + CHATML
)
INTERNLM = "{{ bos_token }}" + CHATML
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def build(kind: str, texts: Iterable[str], *, size: int, template: str, end_of_turn: str) -> Any:
    """A tokenizer of about `size` tokens, `kind` being `sentencepiece` (BPE with a dummy prefix, byte fallback and single
    digits), `unigram` (numbers may be one token) or `byte-level` (BPE, single digits)."""
    make = {"sentencepiece": _sentencepiece, "unigram": _unigram, "byte-level": _byte_level}[kind]
    markers = [name for name in ("<|im_start|>", "<|im_end|>", "<|end_of_turn|>") if name in template]
    backend, names = make(texts, size)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in markers])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=512, clean_up_tokenization_spaces=False, **names
    )
    tokenizer.eos_token = end_of_turn
    tokenizer.chat_template = template
    return tokenizer


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _state(tokenizer: Tokenizer) -> dict[str, Any]:
    return dict(json.loads(tokenizer.to_str())["model"])


def _sentencepiece(texts: Iterable[str], size: int) -> tuple[Tokenizer, dict[str, str]]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    state = _state(trained)
    pieces = ["<unk>", "<s>", "</s>", *_byte_tokens(), *sorted(state["vocab"], key=state["vocab"].get)]
    vocabulary = {piece: token for token, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer, {"unk_token": "<unk>", "bos_token": "<s>", "pad_token": "</s>"}


def _unigram(texts: Iterable[str], size: int) -> tuple[Tokenizer, dict[str, str]]:
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 256, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    learnt = [(piece, score) for piece, score in _state(trained)["vocab"] if piece not in special]
    vocabulary = [(piece, 0.0) for piece in special] + [(piece, -20.0) for piece in _byte_tokens()] + learnt
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return tokenizer, {"unk_token": "<unk>", "bos_token": "<s>", "pad_token": "</s>"}


def _byte_level(texts: Iterable[str], size: int) -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer, {"pad_token": "<|endoftext|>"}
