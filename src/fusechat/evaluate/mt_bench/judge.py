"""What the judge of MT-Bench is asked, and what its words mean: pure functions of texts.

Prompts, output formats, fallbacks and the treatment of swapped orders are those of Zheng et al., Judging LLM-as-a-Judge with
MT-Bench and Chatbot Arena, 2023 (sections 3.1, 3.4 and appendix A), as published with FastChat.
"""

import re
from collections.abc import Sequence
from typing import Literal

from fusechat.evaluate.mt_bench.data import REFERENCED, MtBench, Question

Mode = Literal["single", "pairwise"]
Verdict = Literal["A", "B", "C"]  # C is a tie
Outcome = Literal["win", "tie", "loss"]
Messages = tuple[tuple[str, str], ...]  # (role, content)

TEMPERATURE, MAX_TOKENS = 0.0, 2048  # of the judge
LOWEST, HIGHEST = 1.0, 10.0

_SCORE = re.compile(r"\[\[([0-9]+\.?[0-9]*)\]\]")
_SCORE_IN_ONE_PAIR = re.compile(r"\[([0-9]+\.?[0-9]*)\]")


def prompt_name(category: str, *, turn: int, mode: Mode) -> str:
    """`turn` is 1 or 2."""
    kinds = {"single": ("single-v1", "single-math-v1"), "pairwise": ("pair-v2", "pair-math-v1")}[mode]
    return kinds[category in REFERENCED] + ("-multi-turn" if turn == 2 else "")


def single(data: MtBench, question: Question, answers: Sequence[str]) -> Messages:
    """What asks for a score of the last of `answers`: a model's answer to the first turn, or its answers to both."""
    fields = {"answer": answers[0]} if len(answers) == 1 else {"answer_1": answers[0], "answer_2": answers[1]}
    return _filled(data, question, fields, turn=len(answers), mode="single")


def pairwise(data: MtBench, question: Question, *, a: Sequence[str], b: Sequence[str]) -> Messages:
    """What asks whether assistant A or B is better in the last turn of their answers: one each, or two each."""
    if len(a) == 1:
        fields = {"answer_a": a[0], "answer_b": b[0]}
    else:
        fields = {"answer_a_1": a[0], "answer_a_2": a[1], "answer_b_1": b[0], "answer_b_2": b[1]}
    return _filled(data, question, fields, turn=len(a), mode="pairwise")


def _filled(data: MtBench, question: Question, fields: dict[str, str], *, turn: int, mode: Mode) -> Messages:
    """Only the template is read for braces, in one pass: braces in questions and answers stay."""
    prompt = data.prompts[prompt_name(question.category, turn=turn, mode=mode)]
    if turn == 1:
        fields["question"] = question.turns[0]
    else:
        fields |= {"question_1": question.turns[0], "question_2": question.turns[1]}
    if question.reference is not None:
        fields |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
    return ("system", prompt.system), ("user", prompt.template.format_map(fields))


def parse_score(text: str) -> float | None:
    """The first `[[n]]`, else the first `[n]`; None where there is none, or n is not between 1 and 10."""
    found = _SCORE.search(text) or _SCORE_IN_ONE_PAIR.search(text)
    if found is None:
        return None
    score = float(found[1])
    return score if LOWEST <= score <= HIGHEST else None


def keeps_format(text: str) -> bool:
    """Whether a score stands in two pairs of brackets, as the prompt asks; `parse_score` reads one pair as well."""
    return _SCORE.search(text) is not None


def parse_verdict(text: str) -> Verdict | None:
    """As published: A where `[[A]]` is anywhere, else B, else C, for a tie."""
    verdicts: tuple[Verdict, ...] = ("A", "B", "C")
    return next((verdict for verdict in verdicts if f"[[{verdict}]]" in text), None)


def for_model(verdict: Verdict, *, is_a: bool) -> Outcome:
    """What a verdict means for the model that was assistant A (`is_a`) or B."""
    if verdict == "C":
        return "tie"
    return "win" if (verdict == "A") == is_a else "loss"


def joined(first: Outcome | None, second: Outcome | None) -> Outcome | None:
    """One outcome for a model from its two orders: what both say; a tie where they differ; None where one says nothing."""
    if first is None or second is None:
        return None
    return first if first == second else "tie"
