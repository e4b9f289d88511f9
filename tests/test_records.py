"""Records of all usual forms: what they say is read, refused in words, or named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cases import each
from fusechat.data.conversations import Conversation, DataSet, Malformed, Message, read_conversations
from fusechat.data.records import conversation_of

HI = (Message("user", "Hi"), Message("assistant", "Hello!"))
ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
READ_CALL = {**CALL, "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def of(**record: Any) -> Conversation:
    return conversation_of(record, "here")


FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASKED, ANSWERED]},
    "ShareGPT": {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello!"}]},
    "its keys under messages": {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "roles under conversations": {"conversations": [ASKED, ANSWERED]},
    "conversation": {"conversation": [ASKED, ANSWERED]},
    "an empty list next to": {"messages": [], "conversations": [{"from": "human", "value": "Hi"}, ANSWERED]},
    "both the same": {"messages": [ASKED, ANSWERED], "conversations": [ASKED, ANSWERED]},
    "prompt and completion": {"prompt": [ASKED], "completion": [ANSWERED]},
    "as texts": {"prompt": "Hi", "completion": "Hello!"},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Hello!"},
    "parts": {"messages": [{**ASKED, "content": [{"type": "text", "text": "H"}, "i"]}, ANSWERED]},
    "nulls": {"messages": [{**ASKED, "tool_calls": None, "name": None}, {**ANSWERED, "weight": 1}], "system": None},
    "labels": {"id": 7, "source": "web", "messages": [{**ASKED, "id": "m1"}, ANSWERED], "system": "", "tools": "[]"},
}


def test_every_form_has_one_meaning_and_the_id_of_the_plain_one() -> None:
    for name, record in FORMS.items():
        found = conversation_of(record, "here")
        assert found.messages == HI, name
        assert found.id == "15b9b07064199a1445f3", name  # as in test_conversations.py, by sha256sum
        assert not found.unused, name


def test_alpaca_has_more_than_two_turns() -> None:
    found = of(instruction="Sum it.", input="1 2", output="3", history=[["Hi", "Hello!"]], system="Be brief.")
    assert [(one.role, one.content) for one in found.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Sum it.\n\n1 2"),
        ("assistant", "3"),
    ]


def test_a_system_column_is_the_system_message() -> None:
    """Two records that differ in it alone are two conversations."""
    one, other = (of(system=text, messages=[ASKED, ANSWERED]) for text in ("Be a pirate.", "Be a judge."))
    assert one.messages == (Message("system", "Be a pirate."), *HI)
    assert one.id != other.id
    developer = of(messages=[{"role": "developer", "content": "Be a pirate."}, ASKED, ANSWERED], system="Be a pirate.")
    assert developer.id == one.id
    with pytest.raises(ValueError, match="says something else than the system message"):
        of(system="Be a judge.", messages=[{"role": "system", "content": "Be a pirate."}, ASKED, ANSWERED])


def test_messages_of_weight_0_are_context() -> None:
    for key, no, yes in (("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True)):
        found = of(messages=[ASKED, {**ANSWERED, key: no}, {**ASKED, key: no}, {**ANSWERED, key: yes}])
        assert [one.taught for one in found.messages] == [True, False, True, True]
        assert found.responses == ["Hello!"]
        assert found.id != of(messages=[ASKED, ANSWERED, ASKED, ANSWERED]).id
    prompt = of(prompt=[ASKED, ANSWERED, ASKED], completion=[ANSWERED])
    assert [one.taught for one in prompt.messages] == [True, False, True, True], "a prompt is not learnt"
    for turn, why in (
        ({**ANSWERED, "weight": 0.5}, '"weight" of message 2 is 0.5; only 0 and 1'),
        ({**ASKED, "weight": 1}, "a message of role user cannot be learnt"),
        ({**ANSWERED, "weight": 0, "train": True}, "contradict each other"),
    ):
        with pytest.raises(ValueError, match=why):
            of(messages=[ASKED, turn])


def test_calls_of_tools_in_the_forms_of_openai_and_sharegpt() -> None:
    answer = {"role": "tool", "tool_call_id": "c1", "content": "12 C"}
    found = of(messages=[ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, answer, ANSWERED])
    assert [one.role for one in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1] == Message("assistant", "", more={"tool_calls": [READ_CALL]})
    assert found.messages[2].more == {"tool_call_id": "c1"}
    older = of(messages=[ASKED, {"role": "assistant", "function_call": CALL["function"]}])
    text = json.dumps({"name": "weather", "arguments": {"city": "Paris"}})
    shared = of(conversations=[{"from": "human", "value": "Hi"}, {"from": "function_call", "value": text}], tools="[]")
    expected = {"type": "function", "function": READ_CALL["function"]}
    assert older.messages[1].more == shared.messages[1].more == {"tool_calls": [expected]}
    tool = {"name": "weather", "parameters": {}}
    for given in ([{"type": "function", "function": tool}], [tool], json.dumps([tool])):
        assert list(of(messages=[ASKED, ANSWERED], tools=given).tools) == [{"type": "function", "function": tool}]


def test_what_nothing_reads_is_named_and_tells_records_apart() -> None:
    one, other = (of(messages=[ASKED, ANSWERED], score=score, id=score) for score in (1, 2))
    assert list(one.unused) == ["score"]
    assert one.id != other.id != of(messages=[ASKED, ANSWERED]).id
    assert of(messages=[ASKED, {**ANSWERED, "reasoning_content": "Why?"}]).messages[1].more == {
        "reasoning_content": "Why?"
    }


@each("record, why", [
    ({"messages": [ASKED, ANSWERED], "conversations": [ASKED]}, '"messages" and "conversations" both hold'),
    ({"messages": [{**ASKED, "content": [{"type": "image"}]}]}, '"content" of message 1 has a part of type image'),
    ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "lacks the name of its function"),
    ({"messages": [ASKED, {"role": "user", "content": "", "tool_calls": [CALL]}]}, "of role user has calls"),
    ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "its call is not JSON"),
    ({"messages": [ASKED, ANSWERED], "tools": "{"}, '"tools" is not JSON'),
    ({"messages": [ASKED, ANSWERED], "chat_template_kwargs": {"tokenize": True}}, "tokenize is no variable"),
    ({"prompt": 3, "completion": "x"}, '"prompt" is int, neither text nor'),
    ({"messages": [ASKED, ANSWERED], "system": ["x"]}, '"system" is list, not text'),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_in_words(record: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        conversation_of(record, "here")


def test_files_of_other_forms(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"messages": [ASKED, {**ANSWERED, "content": str(n)}]}) + "\n" for n in range(3))
    files = {
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "lines.json": lines.encode(),
        "one.json": lines.splitlines()[0].encode(),
        "zipped.jsonl.gz": gzip.compress(lines.encode()),
        "zipped.json.gz": gzip.compress(f"[{','.join(lines.splitlines())}]".encode()),
        "bom.json": b"\xef\xbb\xbf" + f"[{','.join(lines.splitlines())}]".encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = [
            one for one in read_conversations(DataSet("d", str(tmp_path / name))) if not isinstance(one, Malformed)
        ]
        assert [one.responses[0] for one in found] == (["0"] if name == "one.json" else ["0", "1", "2"]), name


def test_a_column_of_parquet_that_a_record_lacks_is_no_part_of_it(tmp_path: Path) -> None:
    """Every record has every key there, with null where it says nothing."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"system": None, "messages": [ASKED, ANSWERED]},
        {"system": "Be brief.", "messages": [ASKED, {**ANSWERED, "weight": 0, "tool_calls": [READ_CALL]}, ANSWERED]},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    plain, other = read_conversations(DataSet("d", str(tmp_path / "data.parquet")))
    assert isinstance(plain, Conversation)
    assert plain.id == "15b9b07064199a1445f3"
    assert isinstance(other, Conversation)
    assert other.messages[0] == Message("system", "Be brief.")
    assert other.messages[2] == Message("assistant", "Hello!", taught=False, more={"tool_calls": [READ_CALL]})
