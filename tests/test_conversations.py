"""Conversations: one meaning for both forms in every kind of file, and bad ones named with file and line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

import runs
from fusechat.commands.run import run
from fusechat.data.conversations import Conversation, DataSet, Malformed, Message, read_conversations
from fusechat.errors import DataError
from fusechat.pipeline import load_recipe
from test_bad_input import PREFIX, complaints, done

TURNS = [
    [("system", "Be short."), ("user", "Wie heißt du?"), ("assistant", " Anna 🙂\n")],
    [("user", "Hi"), ("assistant", "Hello!")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")],
    [("user", "nobody answers")],
]
FROM = {"system": "system", "user": "human", "assistant": "gpt"}
GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}'


def records(form: str) -> list[dict[str, Any]]:
    if form == "messages":
        return [{form: [{"role": role, "content": text} for role, text in turns]} for turns in TURNS]
    return [{form: [{"from": FROM[role], "value": text} for role, text in turns]} for turns in TURNS]


def write(path: Path, rows: list[dict[str, Any]], *, escape: bool = False) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=escape), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=escape) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Conversation | Malformed]:
    return list(read_conversations(DataSet("data", str(path))))


def test_a_sample_is_the_same_in_any_order_and_within_a_larger_one(tmp_path: Path) -> None:
    """By ids as `sha256sum` gives them, of which the least are taken."""
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": str(n)}]} for n in range(40)
    ]
    texts = [f'[["user", "Hi"], ["assistant", "{n}"]]' for n in range(40)]
    ranked = sorted(range(40), key=lambda n: hashlib.sha256(texts[n].encode()).hexdigest()[:20])
    file, reverse = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [*rows[::-1], rows[3], {"no": 1}])
    for limit in (1, 7, 40, 1000):
        chosen = sorted(ranked[:limit])
        found = [int(one.responses[0]) for one in read_conversations(DataSet("data", str(file), limit=limit))]
        assert found == chosen, "in the order of the file"
        *again, malformed = read_conversations(DataSet("data", str(reverse), limit=limit))
        assert isinstance(malformed, Malformed)
        assert [int(one.responses[0]) for one in again] == [*chosen[::-1], *([3] if 3 in chosen else [])]
    one, two = DataSet("data", str(file)), DataSet("data", str(file), limit=7)
    assert two.identity() == f"{one.identity()} limit=7"
    with pytest.raises(DataError, match="is a file, which has no split test"):
        DataSet("data", str(file), split="test").local()


@pytest.mark.parametrize(
    ("suffix", "escape"), [(".jsonl", False), (".jsonl", True), (".json", False), (".json", True), (".parquet", False)]
)
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_the_same_conversations_in_every_form_and_file(tmp_path: Path, form: str, suffix: str, escape: bool) -> None:
    found = read(write(tmp_path / f"data{suffix}", records(form), escape=escape))
    assert [conversation.messages for conversation in found] == [
        tuple(Message(role, text) for role, text in turns) for turns in TURNS
    ]
    assert [conversation.responses for conversation in found] == [[" Anna 🙂\n"], ["Hello!"], ["b", ""], []]
    # printf '[["user", "Hi"], ["assistant", "Hello!"]]' | sha256sum | cut -c1-20
    assert found[1].id == "15b9b07064199a1445f3"


def test_an_id_is_of_the_content_alone() -> None:
    def identity(*turns: tuple[str, str], where: str = "here") -> str:
        return Conversation(tuple(Message(role, text) for role, text in turns), where).id

    hi = ("user", "Hi")
    assert identity(hi, where="here") == identity(hi, where="there")
    others = [[hi, hi], [("assistant", "Hi")], [("user", "Hi ")], [("user", "hi")], [], [("user", 'Hi"], ["user", "')]]
    assert len({identity(hi), *(identity(*turns) for turns in others)}) == 1 + len(others)


def test_sharegpt_also_takes_the_other_role_names(tmp_path: Path) -> None:
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]
    [other, usual] = read(write(tmp_path / "a.jsonl", [{"conversations": turns}, json.loads(GOOD)]))
    assert other.id == usual.id


def test_where_a_conversation_stands(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n  \r\n{GOOD}\r\n{{\n{GOOD}")  # blank lines are counted, and the last needs no end
    assert [found.where for found in read(path)] == [f"{path}:{line}" for line in (1, 4, 5, 6)]
    assert [isinstance(found, Malformed) for found in read(path)] == [False, False, True, False]
    for suffix in (".json", ".parquet"):
        path = write(tmp_path / f"data{suffix}", records("messages"))
        assert [found.where for found in read(path)] == [f"{path}, record {number}" for number in (1, 2, 3, 4)]


def test_a_data_set_is_known_by_the_bytes_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", records("messages"))
    data = DataSet("data", str(path))
    assert data.identity() == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    path.write_text(GOOD)
    assert data.identity() == f"sha256:{hashlib.sha256(GOOD.encode()).hexdigest()}"


# -- bad ones -----------------------------------------------------------------------------------------------------------


def wait_for_lock(turn: str, key: str = "messages") -> str:
    return f'{{"{key}": [{turn}]}}'


BAD_LINES = {
    "not JSON": ("{oops", "not JSON (Expecting property name enclosed in double quotes, column 2)"),
    "cut off": (GOOD[:40], "not JSON (Expecting ':' delimiter, column 41)"),
    "too many digits": ("9" * 5000, "not JSON ("),
    "too many brackets": ("[" * 100_000, "not JSON ("),
    "a list": (f"[{GOOD}]", "a conversation is an object, not list"),
    "other keys": ('{"text": "Hi"}', 'neither "messages" nor "conversations" holds a list'),
    "no list": ('{"messages": "Hi"}', 'neither "messages" nor "conversations" holds a list'),
    "role": (wait_for_lock('{"role": "robot", "content": "x"}'), "message 1 has unknown role 'robot' (known: system,"),
    "ShareGPT role": (
        wait_for_lock('{"from": "robot", "value": "x"}', "conversations"),
        "message 1 has unknown role 'robot'",
    ),
    "role no text": (wait_for_lock('{"role": ["user"], "content": "x"}'), "message 1 has unknown role ['user']"),
    "no content": (wait_for_lock('{"role": "user"}'), 'message 1 lacks "role" or "content"'),
    "no object": (wait_for_lock('"Hi"'), 'message 1 lacks "role" or "content"'),
    "content null": (
        wait_for_lock('{"role": "user", "content": null}'),
        '"content" of message 1 is NoneType, not text',
    ),
    "content parts": (wait_for_lock('{"role": "user", "content": [{}]}'), '"content" of message 1 is list, not text'),
    "half a pair": (wait_for_lock('{"role": "user", "content": "\\ud83d"}'), "message 1 holds half a surrogate pair"),
    "not UTF-8": (wait_for_lock('{"role": "user", "content": "caf\udce9"}'), "not UTF-8"),
}


def one_source(directory: Path, models: dict[str, Path], data: str, **settings: Any) -> Path:
    """A recipe with one source, and `data` as its data file, with lone surrogates as raw bytes."""
    recipe = runs.write_recipe(
        directory, models, sources={"mistral": str(models["mistral"])}, data={"train": "train.jsonl", **settings}
    )
    (directory / "train.jsonl").write_bytes(data.encode("utf-8", "surrogateescape"))
    return recipe


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_malformed_line_stops_the_run_with_file_and_line(tmp_path: Path, models: dict[str, Path], case: str) -> None:
    line, reason = BAD_LINES[case]
    recipe = one_source(tmp_path, models, f"{GOOD}\n\n{line}\n{GOOD}\n")
    [found] = complaints("run", recipe, "--workdir", tmp_path / "work")
    assert found.startswith(f"{tmp_path / 'train.jsonl'}:3: {reason}")
    assert done(tmp_path) == []


def test_a_malformed_line_as_a_user_sees_it(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = one_source(tmp_path, models, f"{GOOD}\n{{oops\n")
    ended = runs.here("run", recipe, "--workdir", tmp_path / "work")
    assert ended.returncode == 2
    assert ended.stdout == ""
    *progress, error = ended.stderr.splitlines()
    assert progress == ["prepare pivot/data …"]
    assert error.startswith(f"{PREFIX}{tmp_path / 'train.jsonl'}:2: not JSON (")


def test_malformed_lines_are_counted_where_the_recipe_says_skip(tmp_path: Path, models: dict[str, Path]) -> None:
    lines = [GOOD, *(line for line, _ in BAD_LINES.values())]
    recipe = one_source(tmp_path, models, "\n".join(lines) + "\n", on_error="skip", max_rejected=1.0)
    assert run(load_recipe(recipe), tmp_path / "work", until="prepare") == 2
    for model in ("pivot", "mistral"):
        step = tmp_path / "work" / "prepare" / model / "data"
        counts = json.loads((step / "manifest.json").read_text())["counts"]
        assert counts["conversations"] == 1
        assert sum(counts["rejected"].values()) == len(BAD_LINES)
        rejected = [json.loads(line) for line in (step / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [entry["where"] for entry in rejected] == [
            f"{tmp_path / 'train.jsonl'}:{number}" for number in range(2, len(lines) + 1)
        ]
        for entry, (_, reason) in zip(rejected, BAD_LINES.values(), strict=True):
            assert entry["reason"].startswith(f"malformed: {reason}")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("", "no usable conversation for pivot: it holds no records"),
        ("\n\n", "no usable conversation for pivot: it holds no records"),
        (wait_for_lock('{"role": "user", "content": "Hi"}'), "no usable conversation for pivot: no assistant turn (1)"),
    ],
)
def test_data_without_one_usable_conversation(
    tmp_path: Path, models: dict[str, Path], data: str, expected: str
) -> None:
    recipe = one_source(tmp_path, models, data)
    assert complaints("run", recipe, "--workdir", tmp_path / "work") == [f"{tmp_path / 'train.jsonl'}: {expected}"]
    assert done(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("nowhere.jsonl", None, "{path}: no such file"),
        (".", None, "{path}: is a directory; name the file of conversations in it"),
        ("data.csv", "a,b", "{path}: unknown kind of data file; use .jsonl, .json, .parquet"),
        ("no such thing", None, "no such thing: no such file"),
        ("org/nothing", None, "org/nothing: no such file, and no data set of that name could be fetched ("),
        ("data.json", "[{]", "{path}: not JSON (Expecting property name enclosed in double quotes: line 1 column 3"),
        ("data.json", "{}", "{path}: holds dict, not a list of conversations"),
        ("data.json", f"[{GOOD}, 3]", "{path}, record 2: a conversation is an object, not int"),
        ("data.json", "[" * 100_000, "{path}: not JSON ("),
        ("data.json", "[\udce9]", "{path}: not JSON ("),
        ("data.parquet", "", "{path}: not Parquet past record 0 ("),
        ("data.parquet", GOOD, "{path}: not Parquet past record 0 ("),
    ],
)
def test_a_data_file_that_cannot_be_read(
    tmp_path: Path, models: dict[str, Path], name: str, content: str | None, expected: str
) -> None:
    recipe = one_source(tmp_path, models, GOOD, train=name)
    path = (tmp_path / name).resolve()
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work")
    assert line.startswith(expected.format(path=path))
    assert done(tmp_path) == []
