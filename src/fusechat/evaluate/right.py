"""Which answers to held-out prompts are right, as a verifier finds: the share of each model, on each data set.

A record's last answer is what is asked for, with all messages before it; what it holds instead is the verifier's reference.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

from fusechat.data.conversations import Conversation, DataSet, Malformed, read_records
from fusechat.data.records import prompt_of, reference_of
from fusechat.evaluate.records import Measurement
from fusechat.evaluate.statistics import wilson
from fusechat.models.answers import Prompt
from fusechat.models.verify import code_of, needs_reference, verify
from fusechat.recipe.evaluate import Evaluate
from fusechat.run.progress import log, progress

SUITE, METRIC, KEY = "right-answers", "right_answers", "evaluate.verifier"
Reply = Mapping[str, Any]  # of a model to a question: `text`, and the reason where there is none, `missing`


@dataclass(frozen=True)
class Question:
    """`prompt`: its id is the key of its answer; `reference`: None where the record holds no answer."""

    data: str
    prompt: Conversation
    reference: str | list[str] | None
    record: dict[str, Any]

    def asked(self, max_new_tokens: int) -> Prompt:
        messages = tuple((message.role, message.content) for message in self.prompt.messages)
        return Prompt(self.prompt.id, messages, 0.0, max_new_tokens, about=self.prompt)

    def told(self, answer: str) -> dict[str, Any]:
        """What a verifier is told of an answer."""
        messages = [{"role": one.role, "content": one.content, **one.more} for one in self.prompt.messages]
        return {"messages": messages, "answer": answer, "reference": self.reference, "record": self.record}


def read_questions(held_out: Sequence[DataSet], how: Evaluate) -> list[Question]:
    """Of each data set the prompts, each once, or `verifier_limit` of them, those whose ids come first. A record without an
    answer at its end is left out, and said, where the verifier needs one."""
    assert how.verifier is not None
    found: list[Question] = []
    for data in held_out:
        every: dict[str, Question] = {}
        lacking = 0
        for one in read_records(data):
            if isinstance(one, Malformed):
                continue  # which the prepare step tells of
            reference = reference_of(one.whole, one.record)
            if reference is None and needs_reference(how.verifier):
                lacking += 1
                continue
            prompt = prompt_of(one.whole)
            every.setdefault(prompt.id, Question(data.name, prompt, reference, one.record))
        if lacking:
            log.warning(
                "evaluate %s: %d records hold no answer at their end, which the verifier needs", data.name, lacking
            )
        sample = set(nsmallest(how.verifier_limit or len(every), every))
        found += [question for key, question in every.items() if key in sample]
    return found


def judging(how: Evaluate) -> dict[str, Any]:
    """What of the verifier changes which answers are right: not how long it may take."""
    assert how.verifier is not None
    return {"verifier": how.verifier, "code": code_of(how.verifier), "limit": how.verifier_limit}


def judge(questions: Sequence[Question], replies: Mapping[str, Sequence[Reply]], how: Evaluate) -> list[dict[str, Any]]:
    """For each question what each model answered and what the verifier makes of it: `right` is a number, None where there is no
    answer. `replies`: model → its replies, in the order of the questions."""
    assert how.verifier is not None
    pairs = [
        (number, model)
        for number in range(len(questions))
        for model, each in replies.items()
        if each[number]["missing"] is None
    ]
    told = ((questions[at].told(replies[model][at]["text"]), questions[at].prompt.where) for at, model in pairs)
    with progress("verify answers", len(pairs), "answers") as advance:
        found = verify(told, how.verifier, key=KEY, seconds=how.verifier_seconds, advance=advance)
        values = dict(zip(pairs, found, strict=True))
    return [
        {
            "data": question.data,
            "id": question.prompt.id,
            "prompt": [{"role": one.role, "content": one.content} for one in question.prompt.messages],
            "reference": question.reference,
            "answers": {
                model: {"text": each[number]["text"], "right": values.get((number, model))}
                for model, each in replies.items()
            },
        }
        for number, question in enumerate(questions)
    ]


def shares(judged: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, list[Measurement]]]]:
    """Each data set with each model's share of right answers, those of which the verifier makes more than 0, and its interval by
    Wilson. No answer is missing, not wrong."""
    for data in dict.fromkeys(one["data"] for one in judged):
        here = [one for one in judged if one["data"] == data]
        yield data, {model: [_share(data, model, here)] for model in here[0]["answers"]}


def _share(data: str, model: str, judged: Sequence[Mapping[str, Any]]) -> Measurement:
    found = {one["id"]: one["answers"][model]["right"] for one in judged}
    items = {key: (float(value > 0), 1.0) for key, value in found.items() if value is not None}
    right = sum(value for value, _ in items.values())
    interval = list(wilson(int(right), len(items))) if items else None
    why = None if items else "there is no answer"
    more = {"interval": interval}
    return Measurement(data, METRIC, items, len(found) - len(items), why=why, higher_is_better=True, more=more)
