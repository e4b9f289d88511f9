"""Turns a record of JSON or Parquet into a conversation, in all usual formats:

{"messages": [{"role", "content"}, …]}, {"conversations": [{"from", "value"}, …]}, and the keys of either under the other name
{"prompt", "completion"}, texts or lists of messages; {"instruction", "input", "output", "history"}
Where answers are made anew, {"prompt"} and {"instruction", "input", "history"} too. `reference` beside any is for verifiers.

Besides: `system` (or `system_prompt`), `tools`, `chat_template_kwargs`; in a message `weight` or `train`, `tool_calls`, and
whatever else a template reads. Keys that nothing reads are reported, not silently dropped.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusechat.data.messages import Conversation, Message

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    "function_call": "assistant",  # ShareGPT: its text is a call
}
_KNOWN = "system, user, assistant, tool"
_LISTS = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_TAKEN = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
}
# Keys that identify a record or a message and have no content.
_LABELS = {
    *("id", "_id", "idx", "index", "uuid", "hash", "source", "dataset", "split", "timestamp"),
    *("conversation_id", "message_id", "prompt_id"),
}
# Keys that describe an answer that was chosen from several models'.
_OF_CHOSEN = {"prompt_id", "author", "scores", "score", "chosen_by"}


def conversation_of(record: Any, where: str, *, answered: bool = True) -> Conversation:
    """The conversation in a record. `answered`: it must have an answer. Raises ValueError with the reason if it is not one."""
    if not isinstance(record, dict):
        raise ValueError(f"a conversation is an object, not {type(record).__name__}")
    messages, read = _turns(record if answered else _with_answer(record))
    messages, read = _with_system(messages, record, read)
    tools = _tools(record.get("tools"))
    variables = record.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise ValueError(f'"chat_template_kwargs" is {type(variables).__name__}, not an object')
    refuse_taken(variables)
    read |= (
        {"tools", "chat_template_kwargs", "reference"}
        | _LABELS
        | (_OF_CHOSEN if record.keys() >= _OF_CHOSEN else set())
    )
    unused = {key: _digest(value) for key, value in record.items() if key not in read and value is not None}
    for value in (tools, variables):
        _refuse_half_pairs(value, "the record")
    return Conversation(messages, where, tools, variables, unused)


def prompt_of(conversation: Conversation) -> Conversation:
    """The prompt of a conversation: without a last message that is an answer, with earlier answers as context. Unread keys are
    dropped, so that the id is the question's alone. Raises ValueError if there is no question."""
    messages = conversation.messages[: len(conversation.messages) - conversation.is_answered]
    if not messages or not messages[-1].content.strip():
        raise ValueError("the prompt is empty")
    if messages[-1].role not in ("user", "tool"):
        raise ValueError(f"the prompt ends with a message of role {messages[-1].role}, not with a question")
    context = tuple(replace(one, taught=False) if one.role == "assistant" else one for one in messages)
    return replace(conversation, messages=context, unused={}, joined=False)


def reference_of(conversation: Conversation, record: dict[str, Any]) -> str | list[str] | None:
    """The answer that a record holds to its question: its `reference`, a list of texts where several are right, else the last
    message of its conversation if that is an answer."""
    told = record.get("reference")
    if told is not None:
        is_list = isinstance(told, list) and told and all(isinstance(one, str) for one in told)
        return told if isinstance(told, str) or is_list else json.dumps(told, ensure_ascii=False)
    return (conversation.messages[-1].content or None) if conversation.is_answered else None


def refuse_taken(variables: dict[str, Any]) -> None:
    """Raises ValueError for names that are not variables of a template, or that users may not set."""
    for key in variables:
        if not key.isidentifier() or key in _TAKEN:
            raise ValueError(f"chat_template_kwargs: {key} is no variable that a template could be given")


def _turns(record: dict[str, Any]) -> tuple[tuple[Message, ...], set[str]]:
    """The messages, and the keys that they were read from."""
    lists = [key for key in _LISTS if isinstance(record.get(key), list)]
    filled = [key for key in lists if record[key]]
    if filled:
        found = [_messages(record[key]) for key in filled]
        if any(other != found[0] for other in found):
            raise ValueError(f'"{filled[0]}" and "{filled[1]}" both hold messages, and others; keep one of them')
        return found[0], set(lists)
    if "prompt" in record and "completion" in record:
        asked, answer = (_side(record, key, role) for key, role in (("prompt", "user"), ("completion", "assistant")))
        context = [Message(one.role, one.content, one.role != "assistant", one.more) for one in asked]
        return (*context, *answer), {"prompt", "completion", *lists}
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        return _alpaca(record), {"instruction", "input", "output", "history", *lists}
    if lists:
        return (), set(lists)
    raise ValueError('neither "messages" nor "conversations" holds a list')


def _with_answer(record: dict[str, Any]) -> dict[str, Any]:
    """A record that has only a question, with an empty answer, which is not read."""
    for question, answer in (("prompt", "completion"), ("instruction", "output")):
        if question in record and record.get(answer) is None and not any(record.get(key) for key in _LISTS):
            return {**record, answer: ""}
    return record


def _side(record: dict[str, Any], key: str, role: str) -> tuple[Message, ...]:
    value = record[key]
    if isinstance(value, str):
        return _messages([{"role": role, "content": value}])
    if isinstance(value, list):
        return _messages(value)
    raise ValueError(f'"{key}" is {type(value).__name__}, neither text nor a list of messages')


def _alpaca(record: dict[str, Any]) -> tuple[Message, ...]:
    turns: list[Any] = []
    for pair in record.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError('"history" should be a list of pairs of question and answer')
        turns += pair
    more = record.get("input") or ""
    if not isinstance(more, str):
        raise ValueError(f'"input" is {type(more).__name__}, not text')
    turns += [f"{record['instruction']}\n\n{more}" if more else record["instruction"], record["output"]]
    roles = ("user", "assistant")
    return _messages([{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)])


def _with_system(
    messages: tuple[Message, ...], record: dict[str, Any], read: set[str]
) -> tuple[tuple[Message, ...], set[str]]:
    for key in _SYSTEM:
        text = record.get(key)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise ValueError(f'"{key}" is {type(text).__name__}, not text')
        _refuse_half_pairs(text, f'"{key}"')
        if not messages or messages[0].role != "system":
            messages = (Message("system", text), *messages)
        elif messages[0].content != text:
            raise ValueError(f'"{key}" says something else than the system message before the first question')
    return messages, {*read, *_SYSTEM}


def _messages(turns: list[Any]) -> tuple[Message, ...]:
    return tuple(_message(turn, number) for number, turn in enumerate(turns, 1))


def _message(turn: Any, number: int) -> Message:
    keys = (
        ("from", "value") if isinstance(turn, dict) and "from" in turn and "role" not in turn else ("role", "content")
    )
    role_key, text_key = keys
    has_calls = isinstance(turn, dict) and any(turn.get(key) for key in ("tool_calls", "function_call"))
    if not isinstance(turn, dict) or role_key not in turn or not (text_key in turn or has_calls):
        raise ValueError(f'message {number} lacks "{role_key}" or "{text_key}"')
    named = turn[role_key]
    role = _ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f"message {number} has unknown role {named!r} (known: {_KNOWN})")
    text = _text(turn.get(text_key), f'"{text_key}" of message {number}', may_lack=has_calls)
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if named.strip().lower() == "function_call":
        calls, text = _json(text, f"message {number}: its call"), ""
    own = {*keys, "weight", "train", "tool_calls", "function_call", *_LABELS}
    more = {key: value for key, value in turn.items() if key not in own and value is not None}
    if calls:
        if role != "assistant":
            raise ValueError(f"message {number} of role {role} has calls")
        more["tool_calls"] = [_call(call, number) for call in (calls if isinstance(calls, list) else [calls])]
    _refuse_half_pairs([text, more], f"message {number}")
    return Message(role, text, _taught(turn, role, number), more)


def _text(value: Any, what: str, *, may_lack: bool) -> str:
    if value is None and may_lack:
        return ""
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        return "".join(part if isinstance(part, str) else part["text"] for part in value)
    if isinstance(value, list):
        kinds = [str(part.get("type")) for part in value if isinstance(part, dict) and part.get("type")]
        if kinds:
            raise ValueError(f"{what} has a part of type {next((k for k in kinds if k != 'text'), kinds[0])}, not text")
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, not text")
    return value


def _is_text_part(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
    )


def _taught(turn: dict[str, Any], role: str, number: int) -> bool:
    """Whether the message is trained; only answers can be."""
    said = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f'"{key}" of message {number} is {value!r}; only 0 and 1 are known')
        if role != "assistant" and value:
            raise ValueError(f'"{key}" of message {number}: a message of role {role} cannot be learnt, only answers')
    if len(set(map(bool, said.values()))) == 2:
        raise ValueError(f'"weight" and "train" of message {number} contradict each other')
    return role != "assistant" or all(said.values())


def _call(call: Any, number: int) -> dict[str, Any]:
    """A call as templates expect it, with its arguments as an object rather than JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number}: a call lacks the name of its function")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"message {number}: the arguments of {function['name']}")
    about = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **about, "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: Any) -> Sequence[Any]:
    found = _json(value, '"tools"') if isinstance(value, str) and value.strip() else value or []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise ValueError('"tools" is no list of objects')
    return [tool if "type" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in found]


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is not JSON") from None


def _refuse_half_pairs(value: Any, what: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise ValueError(f"{what} holds half a surrogate pair, which is not text")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
