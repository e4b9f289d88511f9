"""Model families in small: each one's class with what is peculiar to it, a tokenizer of its kind, a chat template that treats turns
as its own does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, pre_tokenizers

import tiny

CHATML = tiny.CHATML[tiny.CHATML.index("{% for") :]
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# The system message becomes the beginning of the first user turn.
GEMMA_3 = (
    "{{ bos_token }}{% set first = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}{% endif %}{% for m in turns %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Reasoning is taken out of all turns but the last, which has an empty one where it has none.
QWEN_3 = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ text + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A system turn of its own with what is known of the day, the user's system text inside; answers without reasoning.
SMOLLM_3 = (
    "{% set own = messages[0].content if messages[0].role == 'system' else 'Be helpful.' %}"
    "{{ '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: /no_think\\n\\n' + own + '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}{% endif %}"
)
# Turns begin with plain text, which the tokenizer knows nothing of; a question ends as an answer does.
DANUBE_3 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ ('<|answer|>' if m.role == 'assistant' else '<|prompt|>') + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
WINDOWS = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """`tokens`: a kind of `tiny`, changed by `change`; `added`: its own special tokens, the first of which ends a turn."""

    model: str
    tokens: str
    template: str
    added: tuple[str, ...]
    shape: dict[str, Any]
    change: Callable[[Any], None] = lambda backend: None
    folds_system: bool = False


def llama_3_words(backend: Any) -> None:
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def no_dummy_prefix(backend: Any) -> None:
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)


IM, TURNS = ("<|im_end|>", "<|im_start|>"), ("<end_of_turn>", "<start_of_turn>")
FAMILIES = {
    "Llama 3": Family(
        "Llama",
        "llama",
        LLAMA_3,
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        {"rope_parameters": LLAMA_3_ROPE},
        llama_3_words,
    ),
    "Gemma 2": Family(
        "Gemma2", "gemma", GEMMA_2, TURNS, {**WINDOWS, "final_logit_softcapping": 30.0}, folds_system=True
    ),
    "Gemma 3": Family("Gemma3", "gemma", GEMMA_3, TURNS, WINDOWS),
    "Phi-3": Family(
        "Phi3", "mistral", PHI_3, ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), {"pad_token_id": 0}
    ),
    "Qwen2": Family("Qwen2", "llama", tiny.CHATML, IM, {"tie_word_embeddings": True}),
    "Qwen2.5": Family("Qwen2", "llama", tiny.CHATML, IM, {}, llama_3_words),
    "Qwen3": Family("Qwen3", "llama", QWEN_3, IM, {"head_dim": 16}),
    "H2O-Danube3": Family("Llama", "mistral", DANUBE_3, ("</s>",), {}, folds_system=True),
    "Yi": Family("Llama", "mistral", CHATML, IM, {}, no_dummy_prefix),
    "SmolLM2": Family("Llama", "llama", tiny.CHATML, IM, {"tie_word_embeddings": True}),
    "SmolLM3": Family(
        "SmolLM3", "llama", SMOLLM_3, IM, {"no_rope_layer_interval": 2, "pad_token_id": 0}, llama_3_words
    ),
}


def build(name: str, directory: Path) -> Path:
    """Writes a model of the family with random weights as a plain Hugging Face directory."""
    family = FAMILIES[name]
    tokenizer = tiny.tokenizer_of(family.tokens)
    family.change(tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.added)})
    tokenizer.chat_template = family.template
    model_class = getattr(transformers, f"{family.model}ForCausalLM")
    torch.manual_seed(len(name))
    model = model_class(model_class.config_class(vocab_size=len(tokenizer), **{**SHAPE, **family.shape}))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
