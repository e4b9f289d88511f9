"""How good a model is, by skill: exact match of its greedy answers to last questions, and bits per byte of the right ones."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from fusechat.data.conversations import Conversation, Message
from fusechat.evaluate.bits_per_byte import score_responses
from fusechat.models.answers import Answer, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.generator import Generator
from fusechat.models.reference import Reference
from fusechat.models.tokenise import prepare_conversation
from miniature import corpus
from miniature.skills import SKILLS

LONGEST = 24  # tokens of an answer


def measure(model: Path, split: str, questions: int) -> dict[str, dict[str, float]]:
    """Skill → `exact_match` (share of questions) and `bits_per_byte` of the right answers to the same questions."""
    asked = [(skill, dialogue) for skill in SKILLS for dialogue in corpus.distinct(split, skill, questions)]
    chat_model = ChatModel(model.name, Reference((str(model),)))
    right = _exact_matches(chat_model, [dialogue for _, dialogue in asked])
    bits = _bits(chat_model, asked)
    by_skill: dict[str, list[bool]] = defaultdict(list)
    for (skill, _), hit in zip(asked, right, strict=True):
        by_skill[skill].append(hit)
    return {
        skill: {"exact_match": sum(hits) / len(hits), "bits_per_byte": bits[skill], "n": len(hits)}
        for skill, hits in by_skill.items()
    }


def _exact_matches(chat_model: ChatModel, dialogues: list[corpus.Dialogue]) -> list[bool]:
    """Whether the answer to each last question, greedy, is the dialogue's to the letter."""
    prompts = [
        Prompt(str(at), tuple((turn["role"], turn["content"]) for turn in corpus.messages(dialogue)[:-1]), 0.0, LONGEST)
        for at, dialogue in enumerate(dialogues)
    ]
    found: dict[int, Any] = {}
    generator = Generator(chat_model, dtype="float32", device="cpu", batch_tokens=24000, seed=0)
    generator.answer(prompts, found.__setitem__, [False] * len(prompts))
    return [isinstance(found[at], Answer) and found[at].text == dialogue[-1] for at, dialogue in enumerate(dialogues)]


def _bits(chat_model: ChatModel, asked: list[tuple[str, corpus.Dialogue]]) -> dict[str, float]:
    model, template = chat_model.model(dtype="float32", device="cpu"), chat_model.template()
    prepared, skill_of = [], {}
    for skill, dialogue in asked:
        turns = [Message(turn["role"], turn["content"]) for turn in corpus.messages(dialogue)]
        one = Conversation(tuple(turns), skill)
        prepared.append(prepare_conversation(one, template, max_length=512)[0])
        skill_of[one.id] = skill
    nats: dict[str, float] = defaultdict(float)
    size: dict[str, int] = defaultdict(int)
    for key, responses in score_responses(model, prepared, batch_tokens=8192, advance=lambda _: None).items():
        nll, length = responses[-1]  # of earlier turns nothing is learnt where sources answer
        nats[skill_of[key]] += nll
        size[skill_of[key]] += length
    return {skill: nats[skill] / size[skill] / math.log(2) for skill in nats}
