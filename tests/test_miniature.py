"""The paper in miniature: its skills and splits, its own arithmetic, and its small form from beginning to end."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cases import each

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from miniature import corpus, scores, skills  # noqa: E402
from miniature.answered import Worth, worth  # noqa: E402
from miniature.jobs import Base, Place  # noqa: E402


def right(skill: str, question: str, turns: tuple[str, ...]) -> str | None:
    """The answer, found another way than the program that wrote it; None where this way does not know."""
    words = question.rstrip("?.").replace(":", "").split()
    if skill == "arithmetic":
        left, sign, other = next(words[at : at + 3] for at in range(len(words)) if words[at].isdigit())
        return str(int(left) + int(other) * (1 if sign == "+" else -1))
    if skill in ("sorting", "reversing"):
        letters = question.rpartition(": ")[2].split()
        return " ".join(sorted(letters) if skill == "sorting" else letters[::-1])
    if skill == "follow-up" and words[0] == "And":
        return " ".join(turns[0].rstrip(".").split()[:0:-1])
    return None


@each("skill", skills.SKILLS)
def test_answers_are_right_and_the_same_for_the_same_seed(skill: str) -> None:
    dialogues = corpus.distinct("test", skill, 40)
    assert dialogues == corpus.distinct("test", skill, 40)
    for dialogue in dialogues:
        answer = right(skill, dialogue[-2], dialogue)
        assert answer in (None, dialogue[-1])
        assert len(dialogue) == (4 if skill == "follow-up" else 2)
    checked = [right(skill, dialogue[-2], dialogue) is not None for dialogue in dialogues]
    assert any(checked) == (skill in ("arithmetic", "sorting", "reversing", "follow-up"))


def test_no_content_is_in_two_splits() -> None:
    """However a question is put, all that ask the same are in one split."""
    for skill, program in skills.SKILLS.items():
        rng = random.Random(1)
        split_of_question: dict[tuple[str, ...], str] = {}
        for _ in range(300):
            content, dialogue = program(rng)
            split = corpus.split_of(content)
            assert split_of_question.setdefault(dialogue[:-1], split) == split, skill
    sums = {split: {_sum(one[0]) for one in corpus.distinct(split, "arithmetic", 100)} for split in corpus.SPLITS}
    assert len(set.union(*sums.values())) == sum(map(len, sums.values()))


def _sum(question: str) -> tuple[str, ...]:
    return tuple(word for word in question.rstrip("?.=").split() if word.isdigit() or word in "+-")


def test_a_lesson_has_as_many_wrong_and_rare_ones_as_it_was_asked_for() -> None:
    clean = corpus.lesson(0, a_skill=40, wrong=0.0, rare=1.0)
    spoilt = corpus.lesson(0, a_skill=40, wrong=0.5, rare=1.0)
    assert len(clean) == len(spoilt) == 40 * len(skills.SKILLS)
    assert [one[:-1] for one in clean] == [one[:-1] for one in spoilt]
    wrong = sum(left != right for left, right in zip(clean, spoilt, strict=True))
    assert 0.35 * len(clean) < wrong < 0.55 * len(clean)
    few = corpus.lesson(0, a_skill=40, wrong=0.0, rare=0.1)
    assert len(few) == (4 * len(corpus.RARE)) + 40 * (len(skills.SKILLS) - len(corpus.RARE))
    assert corpus.lesson(1, a_skill=40, wrong=0.0, rare=1.0) != clean


@each("way,scored", [("self", 7 + 9), ("likelihood", 7 + 8 + 9 + 10)])
def test_what_a_choice_was_worth(tmp_path: Path, way: str, scored: int) -> None:
    """By hand: of all prompts one has a wrong answer, and one none. Of `self` nobody scores what others say."""
    changes = {"conversations": {"a_skill": 2}, "sources": ["solar", "mixtral"], "generate": {"choose": way}}
    place, base = Place(tmp_path), Base(changes, 0)
    _, second, *others = base.train(place).read_text().splitlines()
    wrong = {"messages": [*json.loads(second)["messages"][:-1], {"role": "assistant", "content": "wrong"}]}
    work = base.directory(place) / "generate"
    (work / "chosen").mkdir(parents=True)
    (work / "chosen" / "conversations.jsonl").write_text("\n".join([json.dumps(wrong), *others]) + "\n")
    manifests = {"solar/answers": {"tokens": 100}, "mixtral/answers": {"tokens": 50}}
    pairs = ("solar/scores/solar", "solar/scores/mixtral", "mixtral/scores/mixtral", "mixtral/scores/solar")
    manifests |= {pair: {"scored": count} for pair, count in zip(pairs, (7, 8, 9, 10), strict=True)}
    for name, counts in manifests.items():
        (work / "models" / name).mkdir(parents=True)
        (work / "models" / name / "manifest.json").write_text(json.dumps({"counts": counts}))
    prompts = len(others) + 2
    assert worth(changes, place) == Worth((prompts - 2) / prompts, (prompts - 1) / prompts, 150, scored)


def test_intervals_are_students() -> None:
    """By hand: 1, 2, 3 have a standard error of 1/√3, and t is 4.303 at two degrees of freedom."""
    found = scores.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert scores.interval([2.0, 2.0]).half is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="figures are drawn by a browser: make browser")
def test_the_quick_form_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "miniature",
        "--quick",
        "--workdir",
        str(tmp_path / "work"),
        "--docs",
        str(tmp_path / "docs"),
    ]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert first.returncode == 0, first.stderr
    page = (tmp_path / "docs" / "results.md").read_text()
    chosen = ("chosen answers, plain", "chosen answers, their authors", "likelihood", "random", "4: chosen answers")
    for row in ("source solar", "gold, all right", "many-to-one", "fused, SCE; τ", *chosen):
        assert f"| {row}" in page
    assert {path.name for path in (tmp_path / "docs" / "results").glob("*.svg")} == {
        "main.svg",
        "choice.svg",
        "prompts.svg",
    }
    drawn = (tmp_path / "docs" / "results" / "main.svg").read_bytes()
    assert b"exact match" in drawn

    made = sorted((tmp_path / "work" / "measures").iterdir())
    before = {path: path.stat().st_mtime_ns for path in made}
    again = made[0]
    figures = json.loads(again.read_text())
    again.unlink()
    second = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert second.returncode == 0, second.stderr
    assert json.loads(again.read_text()) == figures
    assert {path for path in made if path.stat().st_mtime_ns != before[path]} == {again}
    assert second.stdout == first.stdout
    assert (tmp_path / "docs" / "results" / "main.svg").read_bytes() == drawn
