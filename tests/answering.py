"""Tiny models that know something and end their answers, for tests of the stage `generate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

import runs
import tiny
from fusechat.data.conversations import Conversation, Message
from fusechat.models.chat_model import ChatModel
from fusechat.models.forward import collate, response_logits
from fusechat.models.reference import Reference
from fusechat.models.tokenise import prepare_conversation

WORDS = {"dog": "Hund", "cat": "Katze", "tree": "Baum", "house": "Haus", "moon": "Mond", "bread": "Brot"}
STEPS = 120
KNOWN = {
    "mistral": {word: said if place < 4 else "Auto" for place, (word, said) in enumerate(WORDS.items())},
    "gemma": {word: said if place >= 2 else "Auto" for place, (word, said) in enumerate(WORDS.items())},
}
TRAINING = {**runs.TRAINING, "learning_rate": 5e-3, "num_train_epochs": 1, "save_strategy": "no"}


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


def write_recipe(directory: Path, taught: dict[str, Path], **changes: Any) -> Path:
    """The llama pivot and two sources that answer six prompts; `changes` replace whole sections."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "prompts.jsonl").exists():
        write_prompts(directory / "prompts.jsonl")
    runs.write_conversations(directory / "held-out.jsonl", 3)
    recipe = {
        "name": "tiny",
        "pivot": str(taught["llama"]),
        "sources": {"mistral": str(taught["mistral"]), "gemma": gemma(taught)},
        "data": {"train": "prompts.jsonl", "validation": "held-out.jsonl", "max_length": 128},
        "generate": {"max_new_tokens": 16},
        "capture": {"top_k": 6, "dtype": "float32", "shard_conversations": 4, "batch_tokens": 300},
        "align": {"min_mass": 0.0},
        "fuse": {"sft_weight": 0.5, "training": TRAINING},
        "evaluate": {"dtype": "float32", "answers": 0},
        "device": "cpu",
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False), encoding="utf-8")
    return path


def gemma(taught: dict[str, Path]) -> dict[str, Any]:
    return {"model": str(taught["gemma"]), "chat_template": tiny.TEMPLATE}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rows(directory: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(directory.glob("*-*.json")) for row in json.loads(file.read_text())["rows"]]


def counts(workdir: Path, step: str) -> dict[str, Any]:
    return dict(json.loads((workdir / step / "manifest.json").read_text())["counts"])


def texts(workdir: Path) -> list[str]:
    return [one["messages"][-1]["content"] for one in lines(workdir / "generate/chosen/conversations.jsonl")]


def refused(path: Path, *options: str) -> str:
    """The one line with which a run ends."""
    done = runs.here("run", path, "--workdir", path.parent / "work", *options)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fusechat: error: ")]
    return line.removeprefix("fusechat: error: ")
