"""The six chat LLMs: each one's architecture, tokenizer, template, and what it was schooled in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from miniature import vocabularies
from miniature.skills import SKILLS

MAKERS: dict[str, Callable[..., Any]] = {
    "Mistral": lambda **shape: MistralForCausalLM(MistralConfig(sliding_window=None, **shape)),
    "Llama": lambda **shape: LlamaForCausalLM(LlamaConfig(**shape)),
    "Mixtral": lambda **shape: MixtralForCausalLM(
        MixtralConfig(sliding_window=None, num_local_experts=4, num_experts_per_tok=2, **shape)
    ),
    "Qwen2": lambda **shape: Qwen2ForCausalLM(Qwen2Config(**shape)),
}


@dataclass(frozen=True)
class Chatter:
    """`mixture`: how often it sees skills, the others 1. `further`: the model that it goes on from."""

    architecture: str
    tokens: str
    vocabulary: int
    template: str
    end_of_turn: str
    hidden: int
    layers: int
    steps: int
    mixture: Mapping[str, float] = field(default_factory=dict)
    further: str | None = None
    tied: bool = False

    @property
    def words(self) -> str:
        """The template's own words, of which any tokenizer would have seen enough."""
        return "GPT4 Correct User: GPT4 Correct Assistant: [INST] [/INST] system\nYou are a helpful assistant\nuser\nassistant\n"

    def weights(self) -> dict[str, float]:
        return {skill: self.mixture.get(skill, 1.0) for skill in SKILLS}


PIVOT = "openchat"
END = "<|im_end|>"
CHATTERS = {
    "openchat": Chatter(
        "Mistral",
        "sentencepiece",
        560,
        vocabularies.OPENCHAT,
        "<|end_of_turn|>",
        128,
        4,
        steps=1500,
        mixture={
            "sorting": 0.35,
            "units": 0.7,
            "facts": 0.7,
            "dates": 2,
            "editing": 2,
            "arithmetic": 1.5,
            "reversing": 1.2,
            "follow-up": 1.2,
        },
    ),
    "starling": Chatter(
        "Mistral",
        "sentencepiece",
        560,
        vocabularies.OPENCHAT,
        "<|end_of_turn|>",
        128,
        4,
        steps=1000,
        mixture={"dates": 4, "follow-up": 4},
        further="openchat",
    ),
    "solar": Chatter(
        "Llama",
        "sentencepiece",
        900,
        vocabularies.CHATML,
        END,
        128,
        5,
        steps=2000,
        mixture={"arithmetic": 4, "units": 3},
    ),
    "internlm": Chatter(
        "Llama", "unigram", 1100, vocabularies.INTERNLM, END, 128, 5, steps=2000, mixture={"facts": 3, "editing": 4}
    ),
    "mixtral": Chatter(
        "Mixtral",
        "sentencepiece",
        480,
        vocabularies.INST,
        "</s>",
        128,
        3,
        steps=2000,
        mixture={"sorting": 3, "reversing": 4},
    ),
    "qwen": Chatter(
        "Qwen2",
        "byte-level",
        900,
        vocabularies.WITH_SYSTEM,
        END,
        128,
        5,
        steps=2200,
        mixture={"editing": 2, "dates": 2, "reversing": 2},
        tied=True,
    ),
    "novice": Chatter("Llama", "sentencepiece", 700, vocabularies.CHATML, END, 96, 3, steps=100),
}
NOVICE = "novice"  # a bad source
SOURCES = [name for name in CHATTERS if name not in (PIVOT, NOVICE)]


def build(chatter: Chatter, tokenizer: Any) -> Any:
    """The model with random weights, in float32."""
    return MAKERS[chatter.architecture](
        vocab_size=len(tokenizer),
        hidden_size=chatter.hidden,
        intermediate_size=3 * chatter.hidden,
        num_hidden_layers=chatter.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=chatter.tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
