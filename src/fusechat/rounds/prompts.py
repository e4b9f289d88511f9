"""The prompts of a target's rounds, each with the source that teaches it, and which of them a round has."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusechat.data.conversations import Conversation, DataSet
from fusechat.data.prompts import read_prompts
from fusechat.recipe.rounds import Teacher, taught_targets
from fusechat.recipe.schema import Recipe

NOT_CHOSEN, NO_TEACHER = "it has no chosen answer", "nobody who teaches the target is its teacher"
CHOSEN = "conversations.jsonl"
Taught = tuple[Conversation, str]  # a prompt and its teacher


def sets_of(recipe: Recipe, target: str) -> list[DataSet]:
    """The files whose prompts a target answers: those that were answered for it, or its conversations without their answers."""
    if recipe.generate is not None:
        return list(dict.fromkeys(data for name in recipe.answering for data in recipe.read_sets(name)))
    return [replace(data, prompts=True) for data in recipe.training_sets(target)]


def taught_prompts(recipe: Recipe, target: str, chosen: Path | None) -> tuple[list[Taught], dict[str, int]]:
    """Every prompt that somebody teaches, in the files' order, and how many others there are, by why. `chosen`: where the answers
    lie that the run chose."""
    assert recipe.rounds is not None
    prompts = read_prompts(sets_of(recipe, target)).conversations
    rule, may_teach = recipe.rounds.teacher, taught_targets(recipe)[target]
    if isinstance(rule, Teacher):
        return [(one, rule.source) for one in prompts], {}
    assert chosen is not None
    lines = map(json.loads, (chosen / CHOSEN).read_text(encoding="utf-8").splitlines())
    teachers = {line["prompt_id"]: _teacher(line, rule, may_teach) for line in lines}
    found, left_out = [], Counter[str]()
    for one in prompts:
        if one.id not in teachers:
            left_out[NOT_CHOSEN] += 1
        elif (teacher := teachers[one.id]) is None:
            left_out[NO_TEACHER] += 1
        else:
            found.append((one, teacher))
    return found, dict(left_out)


def _teacher(line: dict[str, Any], rule: str, may_teach: Sequence[str]) -> str | None:
    """Of a chosen answer: its author, or the source that finds it most likely; of equal ones the first in the recipe's order."""
    if rule == "author":
        return line["author"] if line["author"] in may_teach else None
    scores = {name: line["scores"].get(name) for name in may_teach}
    known = {name: nats for name, nats in scores.items() if nats is not None}
    return min(known, key=lambda name: known[name]) if known else None


def of_round(
    prompts: Sequence[Taught], share: float, number: int, *, seed: int, most: int | None = None
) -> list[Taught]:
    """The prompts of round `number`, from 1 on, in the files' order, `most` at most: each round goes on in one shuffled order of
    all prompts where the one before stopped, and begins again at its end."""
    size = max(1, math.floor(share * len(prompts) + 0.5)) if prompts else 0
    order = sorted(range(len(prompts)), key=lambda at: hashlib.sha256(f"{seed} {prompts[at][0].id}".encode()).digest())
    turn = [order[at % len(prompts)] for at in range((number - 1) * size, number * size)]
    return [prompts[place] for place in sorted(set(turn[:most]))]
