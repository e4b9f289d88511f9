"""Chat LLMs of a few thousand parameters, built in seconds: three architectures with three kinds of tokenizer.

- `llama`: Llama, tied embeddings; byte-level BPE; ChatML with a default system text
- `mistral`: Mistral, vocabulary padded past the tokenizer's; SentencePiece-like BPE with a dummy prefix and byte fallback;
  [INST] turns, refuses a system role, strips answers
- `gemma`: Gemma 3, sliding window, tied embeddings; Unigram with Metaspace and byte fallback, no dummy prefix; no chat
  template of its own: `TEMPLATE`
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

KINDS = ("llama", "mistral", "gemma")
PADDED = 7  # ids that mistral's model has past its tokenizer's
DEFAULT_SYSTEM = "You are a helpful assistant."

CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
# For gemma, whose tokenizer brings none.
TEMPLATE_WITHOUT_END = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'Question', 'assistant': 'Answer'}[message['role']] + ': ' + message['content'] }}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
TEMPLATE = TEMPLATE_WITHOUT_END.replace(
    "{{ '\\n\\n' }}", "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
)
TEMPLATES: dict[str, str | None] = {"llama": None, "mistral": None, "gemma": TEMPLATE}  # what a recipe has to give

TENSORS = {  # Transformers' name → llama.cpp's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}

TEXT = """\
The quick brown fox jumps over the lazy dog, and the dog does not mind at all.
What is the capital of France? The capital of France is Paris, a city of two million people on the river Seine.
Please explain how a large language model predicts the next token, step by step, in simple words.
Sure! A model reads the text that it was given, and then it gives every token of its vocabulary a probability.
If a train travels 60 miles in 1.5 hours, its speed is 60 / 1.5 = 40 miles per hour. The answer is 40.
There are 12 eggs in a box; she buys 3 boxes, uses 7 eggs and has 29 left: 12 * 3 - 7 = 29.
def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))
Die Straße über den Fluß ist schön, aber für größere Wagen gesperrt. Übung macht den Meister.
El niño comió mañana una manzana; ¿dónde está la biblioteca? Le garçon a mangé une pêche à l'école, déjà.
Москва является столицей России. Как тебя зовут? Меня зовут Анна.
北京是中国的首都。你好，世界！日本の首都は東京です。ありがとうございます。
مرحبا بالعالم، كيف حالك اليوم؟ שלום עולם, מה שלומך היום?
Emoji are text as well: 🙂 👍 🚀 and so are arrows → and dashes – or “quotes”.
"""
LINES = TEXT.splitlines(keepends=True)


def build(kind: str, directory: Path, seed: int = 0) -> Path:
    """Writes a tiny chat LLM to `directory` as a plain Hugging Face model directory; the same seed gives the same weights."""
    tokenizer = tokenizer_of(kind)
    model_of(kind, tokenizer, seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind, as Transformers has it, with its chat template where it has one."""
    backend, names, template = {"llama": _byte_level, "mistral": _sentencepiece, "gemma": _unigram}[kind]()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=2048, clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = template
    return tokenizer


def model_of(kind: str, tokenizer: Any, seed: int = 0) -> Any:
    """A randomly initialised model whose distributions are far from uniform."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    size = len(tokenizer)
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=size, tie_word_embeddings=True, **shape)),
        "mistral": lambda: MistralForCausalLM(
            MistralConfig(vocab_size=size + PADDED, tie_word_embeddings=False, sliding_window=None, **shape)
        ),
        "gemma": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=size,
                tie_word_embeddings=True,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"],
                query_pre_attn_scalar=8,
                **shape,
            )
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return makers[kind]().eval()


def write_gguf(path: Path, model: Any, tokenizer: Any, *, without: str = "") -> Path:
    """The llama model as llama.cpp has it, in float32, with its byte-level BPE; `without` leaves a tensor out."""
    config, backend = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(tokenizer.pad_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    names |= {} if config.tie_word_embeddings else {"output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{name}": f"model.layers.{layer}.{own}" for own, name in TENSORS.items()}
    weights = model.state_dict()
    for name, own in names.items():
        if name == without:
            continue
        values = weights[f"{own}.weight"].numpy()
        if name.endswith(("attn_q", "attn_k")):  # rotary halves are interleaved there
            count = heads[name.rpartition(".")[2]]
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_level() -> tuple[Tokenizer, dict[str, str], str | None]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML


def _sentencepiece() -> tuple[Tokenizer, dict[str, str], str | None]:
    tokenizer = sentencepiece_like(LINES[:9], 280)  # other scripts are left to the byte tokens
    return tokenizer, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, INST


def sentencepiece_like(
    lines: list[str], size: int, *, apart: str = "", prefix: bool = True, special: Sequence[str] = ()
) -> Tokenizer:
    """BPE with byte fallback, as Llama's and Mistral's; `prefix`: with a dummy prefix. No merge goes past a space, nor takes in a
    character of the pattern `apart`."""
    trained = Tokenizer(models.BPE())
    words = [pre_tokenizers.Metaspace(), *([pre_tokenizers.Split(Regex(apart), "isolated")] if apart else [])]
    trained.pre_tokenizer = pre_tokenizers.Sequence(words)  # in training only
    trained.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    )
    state = _state(trained)
    pieces = ["<unk>", "<s>", "</s>", *_byte_tokens(), *sorted(state["vocab"], key=state["vocab"].get)]
    vocabulary = {piece: token for token, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>", *special)])
    return tokenizer


def _unigram() -> tuple[Tokenizer, dict[str, str], str | None]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(vocab_size=260, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    learnt = [(piece, score) for piece, score in _state(trained)["vocab"] if piece not in special]
    vocabulary = [(piece, 0.0) for piece in special] + [(piece, -20.0) for piece in _byte_tokens()] + learnt
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return tokenizer, names, None


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _state(tokenizer: Tokenizer) -> dict[str, Any]:
    return dict(json.loads(tokenizer.to_str())["model"])
