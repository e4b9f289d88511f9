"""What the steps of the stage `generate` take: answers, their scores and rewards, the choice."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusechat.generate.backends import BATCH_TOKENS
from fusechat.models.forward import length_batches
from fusechat.plan import estimate, memory
from fusechat.plan.answers import Answers, Asked
from fusechat.plan.devices import Batch, Device
from fusechat.plan.estimate import MANIFEST, STARTING, Estimate, Model
from fusechat.plan.sampling import Counted
from fusechat.recipe.generate import Generate

STAGE = "generate"
_SHARD = 110  # bytes of a file of rows beside its rows
_SCORED = 105  # bytes of a row of scores or rewards
_REPLY = 250  # bytes of a server's reply beside its text
_CHOSEN, _PROMPT, _CANDIDATE, _SCORE = 200, 200, 65, 30  # bytes of what is written of the choice, beside texts
_READ = 10_000_000  # bytes of rows a second that are read and checked, and in memory take so many times their size:
_OBJECTS = 6


@dataclass(frozen=True)
class _Work:
    """Batches of prompts as they are answered: `prompts` of all of them, `steps` of one token after the other and what a step works
    on, `most` steps if in each batch one answer does not end; `largest`: the batch that takes most room, and its longest answer."""

    prompts: Batch
    steps: float
    step: Batch
    most: float
    largest: tuple[Batch, int]


def answer(
    name: str, model: Model, asked: Asked, answers: Answers, how: Generate, capture: Any, device: Device, *, first: bool
) -> Estimate:
    """By a model here, or by vLLM. `capture`: the recipe's settings for it."""
    shape, number = model.shape, answers.answers
    shards = max(1, math.ceil(number / how.samples / capture.shard_conversations))
    alone = capture.backend == "vllm" or capture.device_map is not None
    spread = estimate.spread_over(capture, device)
    devices = spread if alone else min(device.count, shards)
    at_once = 1 if capture.device_map is not None else devices
    work = _work(asked, answers, how, capture.shard_conversations)
    before = device.rates.forward(shape, work.prompts, dtype=capture.dtype)
    each = device.rates.decoding(shape, 1, work.step, dtype=capture.dtype)
    starting = estimate.opening(model, device, spread) + (STARTING["capture"] if first else 0)
    needs: list[float] = []
    for load, longest in (work.largest, (_alone(work.largest[0]), work.largest[1])):
        needs.append(memory.generating(model, load, longest, capture.dtype, device, spread=spread))
    decoded = work.steps * work.step.together
    flops = shape.forward_flops(work.prompts.tokens, work.prompts.rows, work.prompts.length)
    return Estimate(
        *(STAGE, name, number, float(asked.lengths.sum()) * _times(asked, number) + answers.tokens, answers.tokens),
        disk=_rows(answers) + shards * _SHARD + MANIFEST,
        memory=memory.BASE if capture.url else needs[0],
        flops=flops + shape.forward_flops(decoded, decoded, 2 * work.step.length),
        seconds=(before + work.steps * each) / at_once + starting,
        devices=devices,
        details={
            "answer_tokens": round(answers.tokens / max(1.0, number), 1),
            "at_most_seconds": round((before + work.most * each) / at_once + starting, 3),
            "one_at_a_time": memory.BASE if capture.url else needs[1],
            "offloads": capture.device_map is not None,
        },
    )


def _times(asked: Asked, number: float) -> float:
    """How many answers a prompt of the sample stands for."""
    return number / max(1, len(asked.lengths))


def _alone(load: Batch) -> Batch:
    """One prompt of a batch."""
    width = load.fullest / max(1, load.together)
    return Batch(width, 1, width, 1, width)


def _work(asked: Asked, answers: Answers, how: Generate, shard: int) -> _Work:
    """As `models/generator.py` makes batches of the prompts of each shard: of like lengths, with room for the longest answer."""
    room = asked.room or 1 << 30
    some = max(len(asked.lengths), min(shard, round(answers.answers / how.samples)))
    lengths = np.resize(asked.lengths, some) if len(asked.lengths) else asked.lengths
    found: list[tuple[int, int, int]] = []  # prompts, tokens of the longest, tokens that an answer to it may have
    for begin in range(0, len(lengths), shard):
        widths = np.repeat(lengths[begin : begin + shard], how.samples)
        fits = widths[widths + how.max_new_tokens <= room]
        found += [
            (len(batch), int(fits[batch[0]]), how.max_new_tokens)
            for batch in length_batches(fits + how.max_new_tokens, BATCH_TOKENS)
        ]
        found += [(1, int(width), room - int(width)) for width in widths[widths + how.max_new_tokens > room]]
    if not found:
        nothing = Batch(0, 0, 1)
        return _Work(nothing, 0, nothing, 0, (nothing, 0))
    times = answers.answers / how.samples / len(lengths)
    together, width, most = (np.array(column, dtype=float) for column in zip(*found, strict=True))
    most = np.maximum(most - 1, 0)  # the prompts' pass gives the first
    steps = np.minimum([max(answers.longest(number) - 1, 0) for number, _, _ in found], most)
    tokens, decoded = together * width, together * steps
    largest = found[int((tokens + together * most).argmax())]
    return _Work(
        Batch(tokens.sum() * times, together.sum() * times, (tokens * width).sum() / tokens.sum(), together.mean()),
        float(steps.sum() * times),
        Batch(
            0, 0, (decoded * (width + steps / 2)).sum() / max(1.0, decoded.sum()), decoded.sum() / max(1.0, steps.sum())
        ),
        float(most.sum() * times),
        (_batch(*largest[:2]), largest[2]),
    )


def _batch(together: int, width: int) -> Batch:
    return Batch(together * width, together, width, together, together * width)


def served(name: str, asked: Asked, answers: Answers, how: Generate, shard: int) -> Estimate:
    """By a server, whose time and memory are its own affair."""
    number = answers.answers
    shards = math.ceil(number / how.samples / shard)
    text = sum(len(row["text"].encode()) for row in answers.rows) * answers.scale
    read = float(asked.lengths.sum()) * _times(asked, number)
    return Estimate(
        *(STAGE, name, number, read + answers.tokens, answers.tokens),
        disk=_rows(answers, tokens=False) + text + number * _REPLY + shards * _SHARD + MANIFEST,
        details={"calls": round(number), "read": round(read), "written": round(answers.tokens)},
    )


def _rows(answers: Answers, *, tokens: bool = True) -> float:
    """Bytes of the rows."""
    rows = answers.rows if tokens else [{**row, "tokens": []} for row in answers.rows]
    return len(json.dumps({"rows": rows}, indent=1, ensure_ascii=False).encode()) * answers.scale


def score(name: str, model: Model, data: Counted, capture: Any, device: Device, *, first: bool) -> Estimate:
    """By a model, or a reward model, which reads the answers in addition to that."""
    found = estimate.capture(name, model, data, capture, device, first=first)
    number = data.conversations + sum(data.rejected.values())
    return replace(
        found,
        stage=STAGE,
        disk=number * _SCORED + max(1, math.ceil(number / capture.shard_conversations)) * _SHARD + MANIFEST,
        seconds=found.seconds + data.seconds,
    )


def choose(
    authors: Iterable[Answers], above: Sequence[Estimate], prompts: float, chosen: float, scorers: int
) -> Estimate:
    """`above`: the steps that are read; `scorers`: models that score an answer."""
    texts = [one.texts for one in authors]
    sample = [one for each in texts for one in each.sample]
    candidates = sum(each.conversations for each in texts)
    sizes = np.array([[len(part.encode()) for part in _parts(one)] for one in sample], dtype=float).reshape(-1, 2)
    asked, said = sizes.mean(axis=0) if len(sizes) else (0.0, 0.0)
    kept = chosen * (asked + said + _CHOSEN + _SCORE * scorers)
    told = prompts * (asked + _PROMPT) + candidates * (said + _CANDIDATE + _SCORE * scorers)
    read = sum(step.disk for step in above)
    return Estimate(
        *(STAGE, "chosen", chosen),
        disk=kept + told + 2 * MANIFEST,
        memory=memory.BASE + _OBJECTS * read,
        seconds=read / _READ,
    )


def _parts(conversation: Any) -> tuple[str, str]:
    """What is asked, and the answer."""
    *asked, last = [message.content for message in conversation.messages]
    return "\n".join(asked), last
