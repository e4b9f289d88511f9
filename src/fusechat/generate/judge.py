"""Answers judged by an LLM behind a server: a number from 1 to 10 for each, without a look at the others."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.data.conversations import Conversation
from fusechat.generate.backends import AskedServer
from fusechat.recipe.generate import Server
from fusechat.run.progress import log

MOST = 1024  # tokens of a judgement
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_LEAST, _BEST = 1.0, 10.0
_INSTRUCTION = (
    "You judge an answer to the last question of a conversation. Say in a few sentences whether it is right, helpful, relevant and "
    "complete, and in the language that was asked for; length alone is no merit. Then end with a rating from 1 to 10 in double "
    "brackets, such as [[7]]."
)


@dataclass(frozen=True)
class ToJudge:
    prompt: Conversation
    answer: str
    reference: str | list[str] | None


def judge(answers: Sequence[ToJudge], server: Server, journal: Path) -> list[float | None]:
    """The rating of each answer, None where the judge gives none. What it said is in the journal, and is not asked for again.
    Tells first what that will take. Raises ModelError where some have no judgement that a further run may get."""
    from fusechat.models.answers import Missing
    from fusechat.models.client import Request

    asked = AskedServer(server, "generate.choose.judge", journal)
    requests = [Request((("user", text_for(one)),), 0.0, MOST) for one in answers]
    log.info("generate: %s", asked.estimate(requests))
    replies = asked.ask(requests, "judgements", lacking="answers have no judgement")
    ratings = [None if isinstance(reply, Missing) else rating(reply.text) for reply in replies]
    silent = sum(found is None for found in ratings)
    if silent:
        log.warning("generate: of %d of %d answers the judge gives no rating", silent, len(ratings))
    return ratings


def rating(text: str) -> float | None:
    """The last one in a judgement."""
    found = _RATING.findall(text)
    value = float(found[-1]) if found else None
    return value if value is not None and _LEAST <= value <= _BEST else None


def text_for(one: ToJudge) -> str:
    """What the judge reads."""
    turns: list[Any] = [f"[{message.role}]\n{message.content}" for message in one.prompt.messages]
    parts = [_INSTRUCTION, "The conversation:", *turns]
    if one.reference is not None:
        several = isinstance(one.reference, list)
        parts += (
            ["Reference answers, each of them right:", *one.reference]
            if several
            else ["A reference answer:", one.reference]
        )
    return "\n\n".join([*parts, "The answer to judge:", one.answer])
