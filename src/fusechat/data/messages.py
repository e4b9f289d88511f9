"""A conversation: messages, what templates may read besides, and an id derived from its content."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """A message. `taught`: False for an assistant message that is context only, and not trained. `more`: what a template may
    read besides: tool_calls, reasoning_content, name, …"""

    role: str  # system, user, assistant or tool
    content: str
    taught: bool = True
    more: Keys = field(default_factory=dict, hash=False)

    @property
    def is_response(self) -> bool:
        """Whether it is a trained assistant message."""
        return self.role == "assistant" and self.taught

    @property
    def is_plain(self) -> bool:
        """Whether it has only role and content, and is trained if it is an answer."""
        return self.taught and not self.more


@dataclass(frozen=True)
class Conversation:
    """A conversation. `id` is a hash of the content: equal conversations have equal ids, whatever their file.

    `tools` and `variables` are passed to the template. `unused`: keys of the record that nothing reads, with digests of their
    values. `joined`: consecutive answers became one.
    """

    messages: tuple[Message, ...]
    where: str  # file and line, for a person
    tools: Sequence[Any] = field(default=(), hash=False)
    variables: Keys = field(default_factory=dict, hash=False)
    unused: Keys = field(default_factory=dict, hash=False)
    joined: bool = False

    @property
    def id(self) -> str:
        """A hash of roles and contents; if there is more than plain messages, of that too."""
        plain: Any = [[message.role, message.content] for message in self.messages]
        beside = self.tools, self.variables, self.unused
        if any(beside) or not all(message.is_plain for message in self.messages):
            told = [[message.taught, message.more] for message in self.messages]
            plain = [plain, told, [self.tools, self.variables, self.unused]]
        text = json.dumps(plain, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def is_answered(self) -> bool:
        """Whether the last message is an answer."""
        return bool(self.messages) and self.messages[-1].role == "assistant"

    @property
    def responses(self) -> list[str]:
        """The contents of the trained assistant messages."""
        return [message.content for message in self.messages if message.is_response]


@dataclass(frozen=True)
class Malformed:
    """A record that is not a conversation."""

    where: str
    reason: str


def join_turns(messages: Sequence[Message], *, roles: tuple[str, ...]) -> tuple[Message, ...]:
    """Joins consecutive plain messages of one of these roles, with a blank line between their contents."""
    found: list[Message] = []
    for role, turns in groupby(messages, key=lambda message: message.role if message.is_plain else None):
        group = list(turns)
        if role in roles and len(group) > 1:
            group = [replace(group[0], content="\n\n".join(message.content for message in group))]
        found += group
    return tuple(found)


def fold_system(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with the system message, unless empty, in front of the first user message; None if there is nothing to fold."""
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return None
    if not messages[0].content.strip():
        return list(messages[1:])
    first = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
    return [first, *messages[2:]]
