"""The suite: answers, judgements, rates; and the rates of annotations that are there already.

judgements.jsonl          what the judge said, request by request
<model>.annotations.json  the judgements of a model in the published format
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusechat.evaluate.alpaca.annotate import ANNOTATOR, Pair, first_token, judge_requests, preferences
from fusechat.evaluate.alpaca.data import (
    ANNOTATIONS,
    GAMED,
    AlpacaData,
    Annotation,
    beside,
    gamed_file,
    read_annotations,
    write_annotations,
)
from fusechat.evaluate.alpaca.rates import length_controlled, not_controlled, why_not_controlled, win_rate
from fusechat.evaluate.answers import Ask
from fusechat.evaluate.records import Measurement
from fusechat.evaluate.subjects import Subject
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.client import Client, Estimate, Reply, Request
from fusechat.run.files import digest
from fusechat.run.progress import log

JOURNAL = "judgements.jsonl"
_SILENT = "the judge gives no log-probabilities"
_FIRST = 8  # requests that show whether a judge gives log-probabilities at all, before all are paid for


def run(
    subjects: Sequence[Subject],
    *,
    data: AlpacaData,
    answering: Callable[[Subject], AbstractContextManager[Ask]],
    judge: Client,
    directory: Path,
    limit: int | None = None,
    max_new_tokens: int = 2048,
    temperature: float = 0.0,
    announce: Callable[[Estimate], None],
) -> tuple[dict[str, list[Measurement]], dict[str, Any]]:
    """Model → win rate and length-controlled win rate; and the settings. `limit`: of the first so many instructions only.
    `announce` is told what the judge will be asked before it is. Raises DataError where df_gamed.csv is unavailable."""
    data = data.first(limit)
    why = why_not_controlled(data.instructions)
    gamed = None if why else gamed_file(data.gamed, f"give --data a directory that holds {GAMED}")
    prompts = [
        Prompt(str(index), (("user", instruction),), temperature, max_new_tokens)
        for index, instruction in enumerate(data.instructions)
    ]
    begun = []
    for subject in subjects:
        with answering(subject) as ask:
            begun.append(_unjudged(subject, data, ask(prompts)))
    requests = [judge_requests([pair for _, pair in _pairs(annotations)]) for annotations in begun]
    everything = [request for of_one in requests for request in of_one]
    announce(judge.estimate(everything, directory / JOURNAL))
    replies = iter(_replies(judge, everything, directory / JOURNAL))
    measured = {}
    for subject, annotations, of_one in zip(subjects, begun, requests, strict=True):
        judged = _judged(annotations, [next(replies) for _ in of_one])
        _tell(subject, judged)
        write_annotations(directory / f"{subject.folder}{ANNOTATIONS}", judged)
        measured[subject.label] = _rates(judged, gamed, why)
    settings = {
        "annotator": ANNOTATOR,
        "judge": judge.model,
        "baseline": data.generator,
        "data": data.digest,
        "difficulties": None if gamed is None else digest(gamed),
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
    }
    return measured, settings


def score_annotations(path: Path, *, gamed: Path | None) -> tuple[dict[str, list[Measurement]], dict[str, Any]]:
    """The rates of the models (generator_2) in a file of annotations; and what they depend on. `gamed`: df_gamed.csv, by default
    the one next to the file, else the hub's. Raises DataError."""
    found = read_annotations(path)
    why = {label: why_not_controlled([one.instruction for one in of_one]) for label, of_one in found.items()}
    file = None
    if not all(why.values()):
        file = gamed_file(gamed or beside(path), f"put it next to {path}")
    measured = {label: _rates(of_one, file, why[label]) for label, of_one in found.items()}
    every = [one for of_one in found.values() for one in of_one]
    settings = {
        "annotator": ", ".join(sorted({one.annotator for one in every})),
        "baseline": ", ".join(sorted({one.generator_1 for one in every})),
        "annotations": digest(path),
        "difficulties": None if file is None else digest(file),
    }
    return measured, settings


def _rates(annotations: Sequence[Annotation], gamed: Path | None, why: str | None) -> list[Measurement]:
    if gamed is None or why is not None:
        return [win_rate(annotations), not_controlled(annotations, why or "")]
    return [win_rate(annotations), length_controlled(annotations, gamed)]


def _unjudged(subject: Subject, data: AlpacaData, answers: Sequence[Answer | Missing]) -> list[Annotation]:
    """Where both outputs are the same there is nothing to judge: 1.5, as the library has it."""
    found = []
    for instruction, baseline, dataset, answer in zip(
        data.instructions, data.baseline, data.sets, answers, strict=True
    ):
        output = None if isinstance(answer, Missing) else answer.text
        found.append(
            Annotation(
                instruction=instruction,
                output_1=baseline,
                output_2=output,
                generator_1=data.generator,
                generator_2=subject.label,
                annotator=ANNOTATOR,
                preference=1.5 if output == baseline else None,
                dataset=dataset,
                missing=f"no answer: {answer.reason}" if isinstance(answer, Missing) else None,
            )
        )
    return found


def _pairs(annotations: Sequence[Annotation]) -> list[tuple[int, Pair]]:
    """What is to be judged, with its place."""
    return [
        (index, Pair(one.instruction, one.output_1, one.output_2))
        for index, one in enumerate(annotations)
        if one.output_2 is not None and one.preference is None
    ]


def _judged(annotations: Sequence[Annotation], replies: Sequence[Reply | Missing]) -> list[Annotation]:
    found = list(annotations)
    pairs = _pairs(annotations)
    for (index, _), preference in zip(pairs, preferences([pair for _, pair in pairs], replies), strict=True):
        if isinstance(preference, Missing):
            found[index] = replace(found[index], missing=preference.reason)
        else:
            found[index] = replace(found[index], preference=preference)
    return found


def _replies(judge: Client, requests: Sequence[Request], journal: Path) -> list[Reply | Missing]:
    """A judge without log-probabilities is not asked more than it takes to see that."""
    first = judge.ask(requests[:_FIRST], journal, description="judge")
    given = [reply for reply in first if isinstance(reply, Reply)]
    if given and not any(first_token(reply) for reply in given):
        told = "%s: %s, so there are no judgements; AlpacaEval needs a judge that does (remove %s when it does)"
        log.warning(told, judge.address, _SILENT, journal)
        return [Missing(_SILENT) for _ in requests]
    rest = requests[_FIRST:]
    return [*first, *judge.ask(rest, journal, description="judge")] if rest else first


def _tell(subject: Subject, annotations: Sequence[Annotation]) -> None:
    """Why there is no judgement of an answer; what has no answer was told when it was asked for."""
    reasons = Counter(one.missing for one in annotations if one.missing and one.output_2 is not None)
    for reason, count in reasons.most_common():
        if reason != _SILENT:  # said once for all
            log.warning("%s: judgements missing: %d (%s)", subject.label, count, reason)
