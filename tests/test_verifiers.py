"""Verifiers: those that come with FuseChat, functions and commands, and what they do that is no judgement."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fusechat.errors import DataError, FuseChatError
from fusechat.models.verifiers import contains, exact, final_number, last_number
from fusechat.models.verify import code_of, needs_reference, verify

MODULE = """
import os, subprocess, sys, time

def length(asked):
    print("printed, which is no judgement")
    return len(asked["answer"])

def right(asked):
    return asked["answer"] == asked["record"]["gold"] and asked["messages"][0]["role"] == "user" and asked["reference"] is None

def raises(asked):
    raise ZeroDivisionError("by zero\\nof all things")

def hangs(asked):
    subprocess.Popen(["sleep", "60"])
    time.sleep(60)

def garbage(asked):
    return "yes"

def nothing(asked):
    return float("nan")

def dies(asked):
    os._exit(3)

def counts(asked):
    counts.calls = getattr(counts, "calls", 0) + 1
    return counts.calls
"""

COMMAND = """
import json, sys
asked = json.load(sys.stdin)
print(json.dumps(asked["answer"] == asked["record"]["gold"]))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the current one, with a module of functions."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(*answers: str, **more: Any) -> list[tuple[dict[str, Any], str]]:
    told = {"messages": [{"role": "user", "content": "?"}], "reference": None, "record": {"gold": "yes"}, **more}
    return [({**told, "answer": answer}, f"prompts.jsonl:{line}") for line, answer in enumerate(answers, 1)]


def judged(verifier: Any, *answers: str, seconds: float = 20.0, **more: Any) -> list[float]:
    done: list[int] = []

    def advance(amount: int = 1, note: str = "") -> None:
        done.append(amount)

    found = verify(asked(*answers, **more), verifier, key="generate.choose.verifier", seconds=seconds, advance=advance)
    assert len(done) == len(answers)
    return found


def refused(verifier: Any, *answers: str, **how: Any) -> str:
    with pytest.raises(FuseChatError) as failed:
        judged(verifier, *answers, **how)
    (line,) = failed.value.messages
    return line


def test_exact() -> None:
    assert exact({"answer": " 12\n", "reference": "12"})
    assert exact({"answer": "Mu\u0308nchen", "reference": "München"})
    assert not exact({"answer": "12.", "reference": "12"})


def test_contains() -> None:
    for answer, reference, right in (
        ("The German word for dog is Hund.", "Hund", True),
        ("der hund", "Hund", True),
        ("Hunde", "Hund", False),
        ('"Straße"', ["Strasse", "Straße"], True),
        ("pomme  de terre", "pomme de terre", False),
        ("l'e\u0301toile", "étoile", True),
        ("a+b", "a+", False),
        ("", "Hund", False),
    ):
        assert contains({"answer": answer, "reference": reference}) is right, (answer, reference)


def test_of_several_references_each_is_right() -> None:
    for verifier, answer, wrong in ((exact, "b", "c"), (final_number, "it is 8", "9"), (contains, "a B.", "ab")):
        references = ["7", "8"] if verifier is final_number else ["a", "b"]
        assert verifier({"answer": answer, "reference": references})
        assert not verifier({"answer": wrong, "reference": references})


def test_final_number() -> None:
    cases = (
        ("so it is 1,234.50", "1234.5", True),
        ("12 * 3 - 7 = 29.", "#### 29", True),
        ("It takes 3 of 4 days", "4", True),
        ("10-3", "3", True),  # a sum, of which 3 is the last number
        ("It is -3 degrees", "−3", True),
        ("(-3)", "3", False),
        ("none", "3", False),
        ("1,2,3", "3", True),
        ("20 %", "$20", True),
        ("007", "7", True),
        ("29.5", "29", False),
    )
    for answer, reference, right in cases:
        assert final_number({"answer": answer, "reference": reference}) is right, (answer, reference)
    assert last_number("a") is None
    with pytest.raises(ValueError, match="no number"):
        final_number({"answer": "3", "reference": "three"})


def test_those_that_come_with_fusechat_run_in_a_process_too() -> None:
    assert judged("exact", "a", "b", reference="b") == [0.0, 1.0]
    assert judged("final_number", "7", "it is 8", reference="8") == [0.0, 1.0]
    assert judged("contains", "x", "so: X", reference=["y", "x"]) == [1.0, 1.0]
    assert needs_reference("exact")
    assert needs_reference("final_number")
    assert not needs_reference("mine:right")
    assert "prompts.jsonl:1: verifier final_number: raised ValueError: the reference holds no number" in refused(
        "final_number", "7", reference="none"
    )


def test_a_function_is_told_all_and_gives_a_number(place: Path) -> None:
    assert judged("mine:length", "", "yes", "größer 🙂") == [0.0, 3.0, 8.0]
    assert judged("mine:right", "yes", "no") == [1.0, 0.0]
    assert sorted(judged("mine:counts", *"abcdefghij"))[0] == 1.0, "its process goes on"
    assert len(code_of("mine:length")) == 1
    before = code_of("mine:length")
    (place / "mine.py").write_text(MODULE + "\n")
    assert code_of("mine:length") != before
    assert code_of("no.such:thing") == []


def test_a_function_that_does_not_judge(place: Path) -> None:
    assert refused("mine:raises", "a") == (
        "prompts.jsonl:1: verifier mine:raises: raised ZeroDivisionError: by zero of all things"
    )
    began = time.monotonic()
    assert refused("mine:hangs", "a", seconds=0.5) == (
        "prompts.jsonl:1: verifier mine:hangs: says nothing within 0.5 s"
    )
    assert time.monotonic() - began < 30
    assert refused("mine:garbage", "a") == (
        "prompts.jsonl:1: verifier mine:garbage: gave 'yes', not true, false or a number"
    )
    assert "not true, false or a number" in refused("mine:nothing", "a")
    assert refused("mine:dies", "a") == "prompts.jsonl:1: verifier mine:dies: its process ended"
    assert "broken:thing: cannot be imported (ZeroDivisionError" in refused("broken:thing", "a")
    assert "no_such:thing: cannot be imported (ModuleNotFoundError" in refused("no_such:thing", "a")
    assert "mine:no_such: cannot be imported (AttributeError" in refused("mine:no_such", "a")


def test_a_command_reads_one_answer_and_writes_one_judgement(place: Path) -> None:
    script = place / "judge.py"
    script.write_text(COMMAND)
    assert judged([sys.executable, str(script)], "yes", "no", "yes") == [1.0, 0.0, 1.0]
    assert judged(f"{sys.executable} '{script}'", "yes") == [1.0]
    assert len(code_of([sys.executable, str(script)])) == 2


def test_a_command_that_does_not_judge(place: Path) -> None:
    assert refused("false", "a") == "prompts.jsonl:1: verifier false: ended with status 1: it says nothing"
    assert (
        refused("echo perhaps", "a")
        == "prompts.jsonl:1: verifier echo perhaps: gave 'perhaps', not true, false or a number"
    )
    assert "gave '', not true" in refused("true", "a")
    assert refused(["sh", "-c", "echo why >&2; exit 4"], "a").endswith("ended with status 4: why")
    began = time.monotonic()
    assert refused(["sh", "-c", "sleep 60; true"], "a", seconds=0.5).endswith("says nothing within 0.5 s")
    assert time.monotonic() - began < 30, "what it started ends with it"
    assert refused("./no-such-file", "a") == (
        "generate.choose.verifier: ./no-such-file: cannot be run (No such file or directory)"
    )


def test_of_several_mistakes_one_is_told(place: Path) -> None:
    with pytest.raises(DataError, match=r"prompts.jsonl:\d+: verifier mine:raises"):
        verify(asked(*"abcdefgh"), "mine:raises", key="k", seconds=20.0, advance=lambda amount=1, note="": None)
