"""MT-Bench of several models: their answers, one round of judgements, and what these come to."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusechat.errors import RecipeError
from fusechat.evaluate.answers import Ask
from fusechat.evaluate.mt_bench import judge as judging
from fusechat.evaluate.mt_bench import measure
from fusechat.evaluate.mt_bench.data import TURNS, MtBench, Question
from fusechat.evaluate.mt_bench.judge import Mode, Outcome
from fusechat.evaluate.records import Measurement
from fusechat.evaluate.subjects import Subject
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.client import Client, Estimate, Reply, Request
from fusechat.run.files import write_text
from fusechat.run.progress import log

JOURNAL = "judgements.jsonl"
FILES: dict[Mode, str] = {"single": "scores.jsonl", "pairwise": "verdicts.jsonl"}  # what the judge said, for a person
Answers = dict[int, list[Answer | Missing]]  # question id → the answer to each turn


@dataclass(frozen=True)
class Case:
    """One thing to judge. `asked` is Missing where there is no answer to judge; `is_a`: the model is assistant A, not B."""

    model: str
    question: Question
    turn: int
    asked: Request | Missing
    is_a: bool = True


@dataclass(frozen=True)
class Judged:
    """`score` in single grading, `outcome` of one order in pairwise comparison; both None where it is missing: `why`."""

    case: Case
    text: str | None  # the judge's words
    score: float | None = None
    outcome: Outcome | None = None
    why: str | None = None


def run(
    subjects: Sequence[Subject],
    *,
    data: MtBench,
    answering: Callable[[Subject], AbstractContextManager[Ask]],
    judge: Client,
    directory: Path,
    mode: Mode,
    baseline: str | None,
    limit: int | None,
    max_new_tokens: int = 1024,
    judge_max_tokens: int = judging.MAX_TOKENS,
    announce: Callable[[Estimate], None],
) -> tuple[dict[str, list[Measurement]], dict[str, Any]]:
    """Label → measurements, and the settings that mattered. `pairwise` compares with the subject of label `baseline` (the first
    one where it is None), which has no measurement of its own; `single` does not look at it. `limit`, at least 1: see `chosen`.

    Answers come first, then `announce` is told what the judge has to do, and may raise. Writes `directory`/scores.jsonl, or
    verdicts.jsonl: a line for each judgement, with the judge's words. Raises RecipeError for a baseline that is none of several
    subjects.
    """
    against = _baseline([subject.label for subject in subjects], baseline) if mode == "pairwise" else None
    questions = chosen(data.questions, limit)
    answers = {subject.label: _answers(subject, questions, answering, max_new_tokens) for subject in subjects}
    if against is None:
        cases = [case for label in answers for case in _single(data, questions, label, answers[label])]
    else:
        others = [label for label in answers if label != against]
        cases = [case for label in others for case in _pairs(data, questions, label, answers[label], answers[against])]
    judged = _judge(cases, judge, directory / JOURNAL, announce, mode=mode, max_tokens=judge_max_tokens)
    write_text(directory / FILES[mode], "".join(f"{_line(one, against)}\n" for one in judged))
    _tell(judged)
    measured = {
        subject.label: _measured([one for one in judged if one.case.model == subject.label], questions, mode)
        for subject in subjects
    }
    turns = range(1, TURNS + 1)
    prompts = {judging.prompt_name(one.category, turn=turn, mode=mode) for one in questions for turn in turns}
    return measured, {
        "mode": mode,
        "baseline": against,
        "judge": judge.model,
        "judge_temperature": judging.TEMPERATURE,
        "prompts": sorted(prompts),
        "reference_answers": data.reference,
        "data_sha256": data.digest,
        "questions": len(questions),
        "temperatures": "published",
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "judge_max_tokens": judge_max_tokens,
    }


def chosen(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """`limit` of the questions, in their order: the first of every category, then the second of every one, and so on; where
    they do not go round, the categories that come first in the file have one more. With 8, each of 8 categories has one."""
    if limit is None:
        return list(questions)
    seen: Counter[str] = Counter()
    rounds = []
    for place, question in enumerate(questions):
        rounds.append((seen[question.category], place))
        seen[question.category] += 1
    return [questions[place] for _, place in sorted(sorted(rounds)[:limit], key=lambda pair: pair[1])]


def _baseline(labels: list[str], baseline: str | None) -> str:
    if len(labels) < 2:
        raise RecipeError("MT-Bench: pairwise comparison needs a second model; name one, or grade single answers")
    if baseline is not None and baseline not in labels:
        raise RecipeError(f"--baseline: {baseline} is none of the models: {', '.join(labels)}")
    return labels[0] if baseline is None else baseline


def _answers(
    subject: Subject,
    questions: Sequence[Question],
    answering: Callable[[Subject], AbstractContextManager[Ask]],
    max_new_tokens: int,
) -> Answers:
    """The second turn follows the model's own first answer; without one it is not asked."""
    found: Answers = {}
    with answering(subject) as ask:
        prompts = [_prompt(question, [], max_new_tokens) for question in questions]
        for question, answer in zip(questions, ask(prompts), strict=True):
            found[question.id] = [answer]
        second = [(question, answer) for question in questions if isinstance(answer := found[question.id][0], Answer)]
        prompts = [_prompt(question, [answer.text], max_new_tokens) for question, answer in second]
        for (question, _), answer in zip(second, ask(prompts) if prompts else [], strict=True):
            found[question.id].append(answer)
    return found


def _prompt(question: Question, said: Sequence[str], max_new_tokens: int) -> Prompt:
    messages = []
    for turn, text in zip(question.turns, said, strict=False):
        messages += [("user", turn), ("assistant", text)]
    messages.append(("user", question.turns[len(said)]))
    return Prompt(f"{question.id}/{len(said) + 1}", tuple(messages), question.temperature, max_new_tokens)


def _single(data: MtBench, questions: Sequence[Question], model: str, answers: Answers) -> Iterator[Case]:
    for question in questions:
        for turn in range(1, TURNS + 1):
            texts = _texts(answers[question.id], turn, model)
            asked = texts if isinstance(texts, Missing) else _request(judging.single(data, question, texts))
            yield Case(model, question, turn, asked)


def _pairs(
    data: MtBench, questions: Sequence[Question], model: str, answers: Answers, theirs: Answers
) -> Iterator[Case]:
    """Both orders of every turn."""
    for question in questions:
        for turn in range(1, TURNS + 1):
            ours, other = _texts(answers[question.id], turn, model), _texts(theirs[question.id], turn, "the baseline")
            for is_a in (True, False):
                yield Case(model, question, turn, _comparison(data, question, ours, other, is_a=is_a), is_a)


def _comparison(
    data: MtBench, question: Question, ours: list[str] | Missing, other: list[str] | Missing, *, is_a: bool
) -> Request | Missing:
    if isinstance(ours, Missing):
        return ours
    if isinstance(other, Missing):
        return other
    a, b = (ours, other) if is_a else (other, ours)
    return _request(judging.pairwise(data, question, a=a, b=b))


def _request(messages: judging.Messages) -> Request:
    return Request(messages, judging.TEMPERATURE, judging.MAX_TOKENS)


def _texts(answers: Sequence[Answer | Missing], turn: int, who: str) -> list[str] | Missing:
    """The answers up to `turn`, all of which its judgement shows."""
    texts = []
    for number, answer in enumerate(answers[:turn], 1):
        if isinstance(answer, Missing):
            return Missing(f"{who} has no answer to turn {number}: {answer.reason}")
        texts.append(answer.text)
    return texts


def _judge(
    cases: Sequence[Case],
    judge: Client,
    journal: Path,
    announce: Callable[[Estimate], None],
    *,
    mode: Mode,
    max_tokens: int,
) -> list[Judged]:
    requests = [replace(case.asked, max_tokens=max_tokens) for case in cases if isinstance(case.asked, Request)]
    journal.parent.mkdir(parents=True, exist_ok=True)
    announce(judge.estimate(requests, journal))
    replies = iter(judge.ask(requests, journal, description="judgements"))
    return [_read(case, case.asked if isinstance(case.asked, Missing) else next(replies), mode) for case in cases]


def _read(case: Case, reply: Reply | Missing, mode: Mode) -> Judged:
    if isinstance(reply, Missing):
        return Judged(case, None, why=reply.reason)
    cut = "; it was cut off (--judge-max-tokens)" if reply.finish == "length" else ""
    if mode == "single":
        score = judging.parse_score(reply.text)
        why = None if score is not None else f"the judge's text has no score from 1 to 10{cut}"
        return Judged(case, reply.text, score=score, why=why)
    verdict = judging.parse_verdict(reply.text)
    if verdict is None:
        return Judged(case, reply.text, why=f"the judge's text has no verdict{cut}")
    return Judged(case, reply.text, outcome=judging.for_model(verdict, is_a=case.is_a))


def _line(one: Judged, against: str | None) -> str:
    case = one.case
    found: dict[str, Any] = {"model": case.model, "question": case.question.id, "turn": case.turn}
    found["category"] = case.question.category
    if against is None:
        found["score"] = one.score
    else:
        found |= {"against": against, "model_is": "A" if case.is_a else "B", "outcome": one.outcome}
    return json.dumps({**found, "judge": one.text, "why": one.why}, ensure_ascii=False)


def _tell(judged: Sequence[Judged]) -> None:
    loose = sum(one.score is not None and not judging.keeps_format(one.text or "") for one in judged)
    if loose:
        log.info("MT-Bench: %d of %d scores were read from [n], since the judge wrote no [[n]]", loose, len(judged))
    for why, count in Counter(one.why for one in judged if one.why).most_common():
        log.warning("MT-Bench: %d of %d judgements are missing: %s", count, len(judged), why)


def _measured(judged: Sequence[Judged], questions: Sequence[Question], mode: Mode) -> list[Measurement]:
    """None for the baseline, of which nothing was judged."""
    if not judged:
        return []
    if mode == "single":
        return measure.of_scores(questions, {(one.case.question.id, one.case.turn): one.score for one in judged})
    first, second = (
        {(one.case.question.id, one.case.turn): one.outcome for one in judged if one.case.is_a == is_a}
        for is_a in (True, False)
    )
    return measure.of_outcomes(questions, {case: judging.joined(first[case], second[case]) for case in first})
