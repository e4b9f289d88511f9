"""Tiny models that know something and end their answers, for tests of the stage `generate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import tiny
from fusechat.data.conversations import Conversation, Message
from fusechat.models.chat_model import ChatModel
from fusechat.models.forward import collate, response_logits
from fusechat.models.reference import Reference
from fusechat.models.tokenise import prepare_conversation

WORDS = {"dog": "Hund", "cat": "Katze", "tree": "Baum", "house": "Haus", "moon": "Mond", "bread": "Brot"}
STEPS = 120


def question(word: str) -> str:
    return f"{word} in German?"


def write_prompts(path: Path, words: Sequence[str] = tuple(WORDS), **more: Any) -> Path:
    """A prompt for each word; `more`: keys of each record, by word."""
    lines = [{"prompt": question(word), **{key: value[word] for key, value in more.items()}} for word in words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def teach(directory: Path, out: Path, kind: str, answers: dict[str, str], steps: int = STEPS) -> Path:
    """A copy of a tiny model that was fine-tuned to give these answers, by a plain loop."""
    chat_model = ChatModel(kind, Reference((str(directory),)), tiny.TEMPLATES[kind])
    template = chat_model.template()
    asked = [
        Conversation((Message("user", question(word)), Message("assistant", said)), word)
        for word, said in answers.items()
    ]
    batch = collate([prepare_conversation(one, template, max_length=256)[0] for one in asked])
    gold = batch.input_ids[batch.rows[:, 0], batch.rows[:, 1]]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(response_logits(model, batch), gold)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(out)
    template.tokenizer.save_pretrained(out)
    return out
