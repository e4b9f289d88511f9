"""Training a tiny chat LLM from scratch on dialogues of its skills, written as it reads."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fusechat.data.conversations import Message
from fusechat.models.templates import ChatTemplate
from miniature import chatters, corpus, vocabularies
from miniature.chatters import Chatter

BATCH = 64
POOL = 12  # batches that are sorted by length together
PEAK = 3e-3


def school(name: str, directory: Path, models: Path, *, steps: int | None = None) -> None:
    """Writes the model of this name to `directory`, a plain Hugging Face directory. `models`: where the others are."""
    chatter = chatters.CHATTERS[name]
    torch.manual_seed(sum(map(ord, name)))
    tokenizer, model = _begin(name, chatter, models)
    template = ChatTemplate(tokenizer, None, name)
    steps = steps or chatter.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.05, betas=(0.9, 0.98))
    peak = PEAK if chatter.further is None else PEAK / 2
    model.train()
    for step, (ids, mask, labels) in zip(range(steps), _batches(chatter, template, name), strict=False):
        rate = peak * min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step + 1 == steps:
            print(f"{name}: step {step + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr)
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _begin(name: str, chatter: Chatter, models: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if chatter.further is not None:
        place = models / chatter.further
        return AutoTokenizer.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place)
    dialogues = (dialogue for _, dialogue in corpus.draw("school", chatter.weights(), f"{name} tokenizer"))
    texts = [
        *(text for _, dialogue in zip(range(6000), dialogues, strict=False) for text in dialogue),
        *[chatter.words] * 600,
    ]
    tokenizer = vocabularies.build(
        chatter.tokens, texts, size=chatter.vocabulary, template=chatter.template, end_of_turn=chatter.end_of_turn
    )
    return tokenizer, chatters.build(chatter, tokenizer)


def _batches(
    chatter: Chatter, template: ChatTemplate, name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids, attention mask and labels, int64 [batch, length] each; labels are -100 outside responses."""
    stream = corpus.draw("school", chatter.weights(), name)
    order = torch.Generator().manual_seed(1)
    while True:
        rows = [_row(template, next(stream)[1]) for _ in range(BATCH * POOL)]
        rows.sort(key=lambda row: len(row[0]))
        for start in torch.randperm(POOL, generator=order).tolist():
            yield _collate(rows[start * BATCH : (start + 1) * BATCH])


def _row(template: ChatTemplate, dialogue: corpus.Dialogue) -> tuple[list[int], list[int]]:
    rendered = template.render([Message(turn["role"], turn["content"]) for turn in corpus.messages(dialogue)])
    encoded = template.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    begins = [
        len(rendered.text[: response.begin].rstrip(" ")) for response in rendered.responses
    ]  # a space may be a token
    taught = [range(begin, response.gap_end) for begin, response in zip(begins, rendered.responses, strict=True)]
    labels = [
        token if any(max(start, end - 1) in part for part in taught) else -100
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def _collate(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return ids, mask, labels
