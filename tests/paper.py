"""The paper's six sources in small: each one's class and true shape's proportions (grouped queries, experts, biases), its real
vocabulary and its own chat template, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[2] / "shared"
SHAPES = SHARED / "models.json"
NAMES = {
    "pivot": "openchat/openchat_3.5",
    "starling": "berkeley-nest/Starling-LM-7B-alpha",
    "solar": "NousResearch/Nous-Hermes-2-SOLAR-10.7B",
    "internlm": "internlm/internlm2-chat-20b (Llama form)",
    "mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "qwen": "Qwen/Qwen1.5-72B-Chat",
}
HEAD = 8  # dimensions of an attention head


def build(name: str, directory: Path) -> Path:
    """Writes it as a plain Hugging Face model directory."""
    known = json.loads(SHAPES.read_text())[NAMES[name]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizers" / known["tokenizer"] / "tokenizer.json"),
        bos_token=known["bos_token"],
        eos_token=known["eos_token"],
    )
    tokenizer.chat_template = known["chat_template"]
    model_class = getattr(transformers, known["class"])
    torch.manual_seed(len(name))
    model = model_class(model_class.config_class(**small(known["config"]), bos_token_id=tokenizer.bos_token_id))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert AutoConfig.from_pretrained(directory).architectures == [known["class"]]
    return directory


def small(shape: dict[str, Any]) -> dict[str, Any]:
    """Two narrow layers with as many queries to a key, as many experts and as large a vocabulary."""
    keys = 4 if shape["num_key_value_heads"] == shape["num_attention_heads"] else 2
    queries = keys * shape["num_attention_heads"] // shape["num_key_value_heads"]
    narrow = {"hidden_size": queries * HEAD, "num_attention_heads": queries, "num_key_value_heads": keys}
    return {**shape, **narrow, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
