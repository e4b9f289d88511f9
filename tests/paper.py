"""The paper's six sources in small: each one's class and true shape's proportions (grouped queries, experts, biases), a vocabulary
of its own, cut, and its own chat template, with random weights."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedTokenizerFast

import texts
import tiny

VOCABULARIES = Path(__file__).with_name("vocabularies")
HEAD = 8  # dimensions of an attention head
CORRECT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Source:
    """`heads`: of queries and of keys, as the model has them; `more`: configuration keys that only it has."""

    architecture: str
    vocabulary: str
    template: str
    bos_token: str | None
    eos_token: str
    heads: tuple[int, int] = (32, 8)
    more: tuple[tuple[str, Any], ...] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return vocabulary(self.vocabulary, bos_token=self.bos_token, eos_token=self.eos_token)


WINDOW, EXPERTS = (("sliding_window", 4096),), (("num_local_experts", 8), ("num_experts_per_tok", 2))
SOURCES = {
    "pivot": Source("Mistral", "openchat_3_5", CORRECT, "<s>", "<|end_of_turn|>", more=WINDOW),
    "starling": Source("Mistral", "openchat_3_5", CORRECT, "<s>", "<|end_of_turn|>", more=WINDOW),
    "solar": Source("Llama", "nh2_solar", CHATML, "<s>", "<|im_end|>"),
    "internlm": Source("Llama", "internlm2", "{{ bos_token }}" + CHATML, "<s>", "</s>", heads=(48, 8)),
    "mixtral": Source("Mixtral", "mistral_v1", INST, "<s>", "</s>", more=EXPERTS),
    "qwen": Source("Qwen2", "qwen1_5", DEFAULT_SYSTEM + CHATML, None, "<|im_end|>", heads=(64, 64)),
}
LIKE: dict[str, dict[str, Any]] = {  # in the shape of vocabularies that are not free to be copied
    "nh2_solar": {"size": 800, "special": ("<|im_end|>", "<|im_start|>")},
    "internlm2": {"size": 1300, "prefix": False, "special": ("<|action_start|>", "<|im_end|>", "<|im_start|>")},
}
REAL = ("internlm2", "mistral_v1", "nh2_solar", "openchat_3_5", "qwen1_5")


def vocabulary(name: str, **names: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of its own for who asks; `names`: its special tokens."""
    given = {key: value for key, value in names.items() if value}
    if name in LIKE:
        return PreTrainedTokenizerFast(tokenizer_object=_trained(name), **given)
    return PreTrainedTokenizerFast(tokenizer_file=str(VOCABULARIES / name / "tokenizer.json"), **given)


@cache
def _trained(name: str) -> Any:
    return tiny.sentencepiece_like(texts.every(), apart=r"(?!▁)[\p{P}\p{S}\p{N}\s]", **LIKE[name])


def build(name: str, directory: Path) -> Path:
    """Writes it as a plain Hugging Face model directory."""
    source, tokenizer = SOURCES[name], SOURCES[name].tokenizer()
    tokenizer.chat_template = source.template
    keys = 4 if source.heads[0] == source.heads[1] else 2
    queries = keys * source.heads[0] // source.heads[1]
    shape = {
        "hidden_size": queries * HEAD,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 4096,
        "vocab_size": len(tokenizer) + (16 if name == "qwen" else 0),  # whose embedding has rows to spare
    }
    model_class = getattr(transformers, f"{source.architecture}ForCausalLM")
    torch.manual_seed(len(name))
    config = model_class.config_class(**shape, **dict(source.more), bos_token_id=tokenizer.bos_token_id)
    model = model_class(config)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert AutoConfig.from_pretrained(directory).architectures == [model_class.__name__]
    return directory
