"""Chat templates: a conversation as one model sees it, and where in that text its responses are.

Responses are found by rendering the conversation a second time with every content replaced by a marker: what stands
between the markers is the template's own text, and between those pieces the contents must follow, as they are or stripped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusechat.core.conversations import Message
from fusechat.core.spans import encode_with_spans
from fusechat.core.token_bytes import token_bytes
from fusechat.errors import ModelError

_OPEN, _CLOSE = "\ue1a7", "\ue1a8"  # private use: in no text that one would train on
_STRIPPED = (str, str.strip, str.lstrip, str.rstrip)  # what templates do to a content, the commonest first


class UnrenderableError(Exception):
    """Why a conversation cannot be used with this template; the conversation is rejected and the reason counted."""


@dataclass(frozen=True)
class Response:
    """Characters of the rendered text. `asked`: where the asked prompt ends, the text after which a model is asked for this
    response; `begin`, `end`: the content; `gap_end`: where the template's text after it ends. `skipped`: how many characters
    of the original content the template stripped from the front."""

    asked: int
    begin: int
    end: int
    gap_end: int
    skipped: int


@dataclass(frozen=True)
class Rendered:
    text: str
    responses: tuple[Response, ...]  # one for each assistant message, in order
    system_folded: bool = False  # the template refuses the system message: it went in front of the first user message


class ChatTemplate:
    """One model's chat template: its own, or the one that the recipe gives.

    `end_of_turn` is the id of the token that the template writes after a response, or None where it writes none. `by_class`: the
    tokenizer that Transformers' class for the model is, where that differs from `tokenizer.json`.
    """

    def __init__(self, tokenizer: Any, template: str | None, model: str, *, by_class: Any | None = None) -> None:
        self.tokenizer, self._by_class = tokenizer, by_class
        self.template = template or tokenizer.chat_template
        if not self.template:
            raise ModelError(f"{model}: has no chat template; a recipe can give it one: set chat_template for it")
        if not isinstance(self.template, str):
            raise ModelError(f"{model}: has several chat templates; choose one by chat_template in the recipe")
        try:
            self.end_of_turn = self._find_end_of_turn()
        except UnrenderableError as error:
            raise ModelError(f"{model}: its chat template fails on a plain question and answer: {error}") from None

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The conversation's text and where its responses are. Raises UnrenderableError with the reason.

        A system message that the template refuses, or leaves out, goes in front of the first user message.
        """
        try:
            return self._locate(messages)
        except UnrenderableError:
            folded = _fold_system(messages)
            if folded is None:
                raise
            return replace(self._locate(folded), system_folded=True)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The asked prompt: the conversation's text up to where the model answers, as training has it. Raises
        UnrenderableError with the reason."""
        folded = _fold_system(messages)
        try:
            answered = self._apply([*messages, Message("assistant", _OPEN)])
            if folded is not None and messages[0].content.strip() not in answered:
                raise UnrenderableError("the template leaves out the system message")
            if _OPEN not in answered:
                raise UnrenderableError("the template leaves out the assistant message")
        except UnrenderableError:
            if folded is None:
                raise
            return self.prompt(folded)
        return answered[: self._asked(messages, answered, answered.rindex(_OPEN))]

    def text(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """What the template writes for these messages, with its own generation prompt where `ask` is set. Raises UnrenderableError
        with the reason."""
        return self._apply(messages, ask=ask)

    def makes_other_tokens(self, text: str, ids: np.ndarray) -> bool:
        """Whether the tokenizer that Transformers takes by itself makes other tokens of a text than `ids`."""
        if self._by_class is None:
            return False
        try:
            return bool(self._by_class(text, add_special_tokens=False)["input_ids"] != ids.tolist())
        except Exception:  # a class for another kind of vocabulary may fail on any text
            return True

    def _asked(self, before: Sequence[Message], text: str, begin: int) -> int:
        """Where in the rendered `text` the asked prompt of the response to the messages `before` ends; its content begins at
        `begin`.

        It is the template's generation prompt, if only white space stands between that and the content; else all text
        before the content: some templates write more there (an empty block of thoughts) or know no generation prompt. Never
        a space at its end: tokens begin with their space, so that the first token of an answer would be another one."""
        end = begin
        try:
            own = self._apply(before, ask=True)
        except UnrenderableError:  # of no messages, or of ones that it refuses without an answer
            own = None
        if own and len(own) <= begin and text.startswith(own) and not text[len(own) : begin].strip():
            end = len(own)
        return len(text[:end].rstrip(" "))

    def _locate(self, messages: Sequence[Message]) -> Rendered:
        text = self._apply(messages)
        marks = [f"{_OPEN}{index}{_CLOSE}" for index in range(len(messages))]
        marked = self._apply([Message(message.role, mark) for message, mark in zip(messages, marks, strict=True)])
        cursor, read = 0, 0
        found: list[tuple[int, int, int]] = []  # begin, end and skipped characters of each content
        for message, mark in zip(messages, marks, strict=True):
            if marked.count(mark) != 1:
                times = "leaves out" if mark not in marked else "repeats"
                raise UnrenderableError(f"the template {times} the {message.role} message")
            at = marked.find(mark, read)
            if at < 0:
                raise UnrenderableError("the template changes the order of the messages")
            piece = marked[read:at]
            if not text.startswith(piece, cursor):
                raise UnrenderableError("the template rewrites a message")
            cursor, read = cursor + len(piece), at + len(mark)
            rest = marked[read:]
            following = rest[: rest.find(_OPEN)] if _OPEN in rest else rest
            content = _content_at(text, cursor, message.content, following)
            if content is None:
                raise UnrenderableError("the template rewrites a message")
            found.append((cursor, cursor + len(content), message.content.find(content)))
            cursor += len(content)
        if text[cursor:] != marked[read:]:
            raise UnrenderableError("the template rewrites a message")
        ends = [begin for begin, _, _ in found[1:]] + [len(text)]
        responses = tuple(
            Response(self._asked(messages[:index], text, begin), begin, end, gap_end, skipped)
            for index, ((begin, end, skipped), gap_end) in enumerate(zip(found, ends, strict=True))
            if messages[index].role == "assistant"
        )
        return Rendered(text, responses)

    def _apply(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        options = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": ask}
        try:
            return str(self.tokenizer.apply_chat_template(turns, **options))
        except Exception as error:  # a template is a program of the user's: it may raise whatever Python can
            raise UnrenderableError(f"the template refuses it: {error}") from None

    def _find_end_of_turn(self) -> int | None:
        """The first special or added token in what the template writes after the last response."""
        rendered = self.render([Message("user", "Hello."), Message("assistant", "Hello!")])
        encoded = encode_with_spans(self.tokenizer, rendered.text)
        table = token_bytes(self.tokenizer)
        content_end = len(rendered.text[: rendered.responses[-1].end].encode())
        for token, (begin, end) in zip(encoded.ids.tolist(), encoded.spans.tolist(), strict=True):
            if begin >= content_end and end > begin and (token in table.added or token in table.special):
                return int(token)
        return None


def _content_at(text: str, cursor: int, content: str, following: str) -> str | None:
    """`content` as it stands at `cursor`, whole or stripped, with the template's `following` text after it."""
    for strip in _STRIPPED:
        candidate = strip(content)
        if text.startswith(candidate + following, cursor):
            return candidate
    return None


def _fold_system(messages: Sequence[Message]) -> list[Message] | None:
    """The system message put in front of the first user message; None where there is nothing to fold."""
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return None
    first = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
    return [first, *messages[2:]]
