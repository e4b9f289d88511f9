"""Models behind servers: they answer prompts, or judge answers; what they said is kept, and what they refuse is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from answering import WORDS, counts, lines, question, refused, rows, write_prompts
from fusechat.commands.run import run
from fusechat.generate.judge import ToJudge, rating, text_for
from fusechat.models import client as module
from fusechat.pipeline import load_recipe
from fusechat.report.generated import generated as told_of_answers
from judging import Canned, canned, completion, misbehaving


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)


class Knows(Canned):
    """A server that knows all words, and keeps to no stop string."""

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        word = body["messages"][-1]["content"].split()[0]
        if word == "moon":
            return 200, completion("Mond and so on", finish="length")
        if word == "bread":
            return 400, {"error": {"message": "I do not talk of bread"}}
        return 200, completion(f" {WORDS[word]}. But wait")


def write_recipe(directory: Path, models: dict[str, Path], url: str, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "prompts.jsonl").exists():
        write_prompts(directory / "prompts.jsonl")
    recipe = {
        "name": "tiny",
        "pivot": str(models["llama"]),
        "sources": {"big": {"server": {"url": url, "model": "big-1"}, "stop": [".", "\n\n"]}},
        "data": {"train": "prompts.jsonl", "max_length": 128},
        "generate": {"max_new_tokens": 16},
        "capture": {"dtype": "float32", "shard_conversations": 4},
        "fuse": {"training": {**runs.TRAINING, "num_train_epochs": 1}},
        "evaluate": {"bits_per_byte": False},
        "device": "cpu",
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False), encoding="utf-8")
    return path


def test_a_server_answers_and_its_answers_are_learnt_by_plain_fine_tuning(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIG_KEY", "secret-key")
    server = Knows()
    with canned(server) as url, misbehaving(url) as (proxied, proxy):
        source = {"server": {"url": proxied, "model": "big-1", "key_env": "BIG_KEY"}, "stop": [".", "\n\n"]}
        path = write_recipe(tmp_path, models, url, sources={"big": source})
        run(load_recipe(path), tmp_path / "work")
    work = tmp_path / "work"
    assert proxy.authorizations == {"Bearer secret-key"}
    assert "secret-key" not in "".join(
        file.read_text(errors="replace") for file in work.rglob("*") if file.suffix in (".json", ".jsonl", ".yaml")
    )
    asked = {body["messages"][-1]["content"]: body for body in server.asked}
    assert set(asked) == {question(word) for word in WORDS}
    assert asked[question("dog")] == {
        "model": "big-1",
        "messages": [{"role": "user", "content": question("dog")}],
        "temperature": 0.0,
        "max_tokens": 16,
        "seed": 0,
        "stop": [".", "\n\n"],
    }
    found = dict(zip(WORDS, rows(work / "generate/models/big/answers"), strict=True))
    assert [found[word]["text"] for word in ("dog", "cat", "tree", "house")] == ["Hund", "Katze", "Baum", "Haus"]
    assert found["moon"]["why"] == "it did not end within max_new_tokens"
    assert found["bread"]["why"] == "status 400: I do not talk of bread"
    chosen = lines(work / "generate/chosen/conversations.jsonl")
    assert [one["author"] for one in chosen] == ["big"] * 4
    assert set(chosen[0]["scores"]) == {"pivot"}, "it cannot score"
    assert counts(work, "generate/models/big/answers")["served_at"] == proxied
    assert counts(work, "fuse/answers")["chosen"] == {"answers": {"none": 4.0, "ties": 0.0, "without comparison": 0.0}}
    assert not (work / "capture").exists()
    (cost, pivot) = told_of_answers(load_recipe(path), work).costs  # type: ignore[union-attr]
    assert (cost.name, cost.answers, cost.calls, cost.scored, pivot.calls) == ("big", 6, 6, None, None)
    assert cost.generated == counts(work, "generate/models/big/answers")["tokens"] > 0, "as the server counts"
    assert "I do not talk of bread" in (work / "report/index.html").read_text()


def test_a_server_that_dies_keeps_what_it_said(models: dict[str, Path], tmp_path: Path) -> None:
    """With few prompts left nothing else would tell of it: what has no answer yet is no answer."""
    server = Knows()
    with canned(server) as url, misbehaving(url, [None, None, *["cut"] * 100]) as (proxied, proxy):
        path = write_recipe(tmp_path, models, proxied)
        line = refused(path, "--until", "generate")
        assert line.startswith("sources.big.server: ")
        assert "run again to go on" in line
        proxy.script([])
        said = len(server.asked)
        run(load_recipe(path), tmp_path / "work", until="generate")
        assert len(server.asked) == 6 + (said > 6), "what was answered is not asked again"
        (tmp_path / "prompts.jsonl").write_text(
            (tmp_path / "prompts.jsonl").read_text() + json.dumps({"prompt": "dog?"}) + "\n"
        )
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(module, "_LONGEST_WAIT", 0.01)
        line = refused(path, "--until", "generate")
    assert line.startswith(f"sources.big.server: the server at {proxied}: no connection")
    assert line.endswith("is it running?")


def test_a_key_that_is_not_there_is_missed_before_any_work(models: dict[str, Path], tmp_path: Path) -> None:
    source = {"big": {"server": {"url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "NO_SUCH_KEY"}}}
    line = refused(write_recipe(tmp_path, models, "", sources=source))
    assert line == "sources.big.server.key_env: the environment has no NO_SUCH_KEY"


def test_samples_of_a_server_have_seeds_of_their_own_and_tools_are_not_sent(
    models: dict[str, Path], tmp_path: Path
) -> None:
    server = Knows()
    with canned(server) as url:
        path = write_recipe(tmp_path, models, url, generate={"samples": 2, "temperature": 0.7, "top_p": 0.9})
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        records = [{"prompt": question("dog")}, {"prompt": question("cat"), "tools": tools}]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        run(load_recipe(path), tmp_path / "work", until="generate")
    assert len({body["seed"] for body in server.asked}) == len(server.asked) == 2
    assert {(body["temperature"], body["top_p"]) for body in server.asked} == {(0.7, 0.9)}
    found = rows(tmp_path / "work/generate/models/big/answers")
    assert [row["why"] for row in found[2:]] == [
        "it has tools, variables or more than texts, which servers are not sent"
    ] * 2


class Grades(Canned):
    """Gives Baum 9 of 10, nothing else more than 2; of Haus it says nothing."""

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        said = body["messages"][-1]["content"].split("The answer to judge:\n\n")[-1]
        return 200, completion({"Baum": "Right. [[9]]", "Haus": "Well"}.get(said, "Wrong: [[3]], no, [[2]]"))


def test_a_judge_chooses(models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grades = Grades()
    with canned(Knows()) as url, canned(grades) as judge:
        generate = {"max_new_tokens": 16, "choose": {"judge": {"url": judge, "model": "wise"}}}
        path = write_recipe(tmp_path, models, url, generate=generate)
        write_prompts(tmp_path / "prompts.jsonl", ["dog", "tree", "house"], reference=WORDS)
        with caplog.at_level("INFO", logger="fusechat"):
            run(load_recipe(path), tmp_path / "work", until="generate")
        asked = len(grades.asked)
        write_prompts(tmp_path / "prompts.jsonl", ["dog", "tree", "house", "cat"], reference=WORDS)
        run(load_recipe(path), tmp_path / "work", until="generate")
        assert (asked, len(grades.asked)) == (3, 4), "what was judged is not judged again"
    work = tmp_path / "work"
    chosen = lines(work / "generate/chosen/conversations.jsonl")
    assert [(one["messages"][-1]["content"], one["score"], one["chosen_by"]) for one in chosen] == [
        ("Hund", 2.0, "judge"),
        ("Baum", 9.0, "judge"),
        ("Katze", 2.0, "judge"),
    ]
    assert counts(work, "generate/chosen")["left_out"] == {"no candidate that the judge accepts": 1}
    assert "generate: judge wise at" in caplog.text
    assert "3 calls; about" in caplog.text
    assert "of 1 of 3 answers the judge gives no rating" in caplog.text


def test_what_a_judge_reads_and_what_is_read_of_it() -> None:
    from fusechat.data.conversations import Conversation, Message

    prompt = Conversation((Message("system", "Be short."), Message("user", "1 + 1?")), "here")
    text = text_for(ToJudge(prompt, "3", "2"))
    assert "[system]\nBe short.\n\n[user]\n1 + 1?\n\nA reference answer:\n\n2\n\nThe answer to judge:\n\n3" in text
    assert "reference" not in text_for(ToJudge(prompt, "3", None))
    assert [rating(said) for said in ("[[7]]", "[[3]] or [[4.5]]", "[[0]]", "[[11]]", "7", "")] == [
        7,
        4.5,
        None,
        None,
        None,
        None,
    ]
