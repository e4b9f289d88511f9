"""Finds the contents of messages in a rendered conversation, by rendering it again with marks and comparing.

First every content is replaced by a mark: the text between the marks is the template's own, and the contents must be between
these pieces, unchanged or stripped. If the template's own text depends on the contents (it removes reasoning, or writes tool
calls), marks are put around one answer at a time, with everything else unchanged.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from fusechat.data.messages import Message

OPEN, CLOSE = "\ue1a7", "\ue1a8"  # private use: not in training texts
REASONING = ("reasoning_content", "reasoning", "thinking")
_STRIPPED = (str, str.strip, str.lstrip, str.rstrip)  # what templates do to a content, most common first
_TAGS = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(/?)THINK\]")
WORDS = 1 << 24  # byte offsets from here on are of a template's own words
Apply = Callable[[Sequence[Message]], str]


class UnrenderableError(Exception):
    """Why a template cannot render a conversation. The conversation is rejected, and the reason counted."""


@dataclass(frozen=True)
class Place:
    """A message in the rendered text, in characters: from `begin` to `end`; the template's text after it ends at `gap_end`.

    `skipped`: characters missing from the front of the original content. `own`: how many characters from `begin` on are the
    content's; the rest are the template's words (calls, reasoning). `dropped`: reasoning is left out.
    """

    begin: int
    end: int
    gap_end: int
    skipped: int
    own: int
    dropped: bool = False


@dataclass(frozen=True)
class Response:
    """A response in the rendered text, in characters. `asked`: the end of the prompt that asks for it; `begin`, `end`: the
    content; `gap_end`: the end of the template's text after it.

    `skipped`: characters that the template stripped from the front of the content. `own`: how many characters are the message's
    own; the rest are the template's words, with byte offsets from `offset` on.
    """

    asked: int
    begin: int
    end: int
    gap_end: int
    skipped: int
    own: int
    offset: int = 0


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation."""

    text: str
    responses: tuple[Response, ...]  # one for each trained assistant message, in order
    system_folded: bool = False  # the template refuses the system message; it is in front of the first user message
    marks: frozenset[str] = frozenset()  # what the template leaves out, by the names of `left_out.py`


def places(messages: Sequence[Message], text: str, apply: Apply) -> list[Place]:
    """The place of each message. Raises UnrenderableError unless each is in the text once, in order, unchanged or stripped."""
    return _marked(messages, text, apply, range(len(messages)))


def _marked(messages: Sequence[Message], text: str, apply: Apply, which: Sequence[int]) -> list[Place]:
    """The places of these messages, with all others unchanged."""
    marks = {index: f"{OPEN}{index}{CLOSE}" for index in which}
    marked = apply([replace(one, content=marks.get(index, one.content)) for index, one in enumerate(messages)])
    cursor, read = 0, 0
    found: list[tuple[int, int, int]] = []  # begin, end and skipped characters of each content
    for index, mark in marks.items():
        message = messages[index]
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
        following = rest[: rest.find(OPEN)] if OPEN in rest else rest
        content = _content_at(text, cursor, message.content, following)
        if content is None:
            raise UnrenderableError("the template rewrites a message")
        found.append((cursor, cursor + len(content), message.content.find(content)))
        cursor += len(content)
    if text[cursor:] != marked[read:]:
        raise UnrenderableError("the template rewrites a message")
    ends = [begin for begin, _, _ in found[1:]] + [len(text)]
    return [
        Place(begin, end, gap_end, skipped, end - begin)
        for (begin, end, skipped), gap_end in zip(found, ends, strict=True)
    ]


def _content_at(text: str, cursor: int, content: str, following: str) -> str | None:
    """`content` as it is at `cursor`, whole or stripped, followed by the template's `following` text; else None."""
    for strip in _STRIPPED:
        candidate = strip(content)
        if text.startswith(candidate + following, cursor):
            return candidate
    return None


def response_places(
    messages: Sequence[Message], text: str, apply: Apply, *, asked: Callable[[int], int | None], end_text: str | None
) -> dict[int, Place]:
    """The places of trained messages, if the template's own text depends on their contents. Raises UnrenderableError. `asked`:
    the end of the prompt that asks for a message, None if the text does not begin with it. `end_text`: what ends a turn."""
    others = [index for index, message in enumerate(messages) if message.role != "assistant"]
    known = dict(zip(others, _marked(messages, text, apply, others), strict=True)) if others else {}
    found: dict[int, Place] = {}
    for index, message in enumerate(messages):
        if not message.is_response:
            continue
        limit = next((known[later].begin for later in others if later > index), len(text))
        limit = min(limit, _written(messages[: index + 1], text, apply))
        found[index] = _response(messages, index, text, apply, asked(index), limit, end_text)
    bounds = [*sorted(place.begin for place in (*known.values(), *found.values())), len(text)]
    return {
        index: replace(place, gap_end=next(bound for bound in bounds if bound >= place.end and bound > place.begin))
        for index, place in found.items()
    }


def _written(messages: Sequence[Message], text: str, apply: Apply) -> int:
    """The length of the text that a template writes for the first messages; all of it if the text does not begin with that."""
    try:
        found = apply(messages)
    except UnrenderableError:
        return len(text)
    return len(found) if text.startswith(found) else len(text)


def _response(
    messages: Sequence[Message],
    index: int,
    text: str,
    apply: Apply,
    asked: int | None,
    limit: int,
    end_text: str | None,
) -> Place:
    message = messages[index]
    has_calls = bool(message.more.get("tool_calls"))
    told = next((str(message.more[key]) for key in REASONING if message.more.get(key)), "").strip()
    if has_calls and apply(_with(messages, index, replace(message, more=_without(message, "tool_calls")))) == text:
        raise UnrenderableError("the template writes no calls of tools")
    if message.content.strip():
        place = _answer(messages, index, text, apply, asked)
    elif asked is not None:
        begin = asked + len(text[asked:limit]) - len(text[asked:limit].lstrip())
        place = Place(begin, begin, limit, 0, 0)
    else:
        raise UnrenderableError("where the template writes a call is not to be found")
    if told:
        before = limit if not message.content.strip() else place.begin  # a call without content has no own begin
        kept = told in text[asked or 0 : before]
        place = _from_reasoning(place, text, told, asked) if kept else replace(place, dropped=True)
    if has_calls:
        at = text.find(end_text, place.end, limit) if end_text else -1
        end = at if at >= 0 else place.end + len(text[place.end : limit].rstrip())
        place = replace(place, end=end)
    return place


def _from_reasoning(place: Place, text: str, reasoning: str, asked: int | None) -> Place:
    """The place extended to the reasoning that the template writes in its own words."""
    begin = text.rfind(reasoning, 0, place.begin) if asked is None else asked
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    return replace(place, begin=begin, skipped=0, own=0)


def _answer(messages: Sequence[Message], index: int, text: str, apply: Apply, asked: int | None) -> Place:
    """The place of a content: whole, or what follows its reasoning, which the template rewrites or drops."""
    message = messages[index]
    content = message.content
    for begin, end in _parts(content):
        changed = content[:begin] + OPEN + content[begin:end] + CLOSE + content[end:]
        try:
            marked = apply(_with(messages, index, replace(message, content=changed)))
        except UnrenderableError:
            continue
        if marked.count(OPEN) != 1 or marked.count(CLOSE) != 1 or marked.replace(OPEN, "").replace(CLOSE, "") != text:
            continue
        at, stop = marked.index(OPEN), marked.index(CLOSE) - 1
        if text[at:stop] != content[begin:end]:
            continue
        before = content[:begin].lstrip()
        if not before:
            return Place(at, stop, len(text), begin, stop - at)
        if text[:at].endswith(before):
            return Place(at - len(before), stop, len(text), begin - len(before), stop - at + len(before))
        place, reasoning = Place(at, stop, len(text), begin, stop - at), _TAGS.sub("", before).strip()
        if not reasoning:
            return place
        if reasoning in text[asked or 0 : at] and (asked is not None or index == len(messages) - 1):
            return _from_reasoning(place, text, reasoning, asked)
        return replace(place, dropped=True)
    raise UnrenderableError("the template rewrites a message")


def _parts(content: str) -> Iterator[tuple[int, int]]:
    """Parts of a content that may be its answer: all, or what follows reasoning; with surrounding white space or without."""
    closed = [found.end() for found in _TAGS.finditer(content) if "/" in found[0]]
    for start in [0, *closed[-1:]]:
        part = content[start:]
        inner = start + len(part) - len(part.lstrip()), len(content.rstrip())
        if inner[0] >= inner[1]:
            continue
        yield from dict.fromkeys([(start, len(content)), inner, (start, inner[1]), (inner[0], len(content))])


def _with(messages: Sequence[Message], index: int, message: Message) -> list[Message]:
    return [*messages[:index], message, *messages[index + 1 :]]


def _without(message: Message, key: str) -> dict[str, object]:
    return {name: value for name, value in message.more.items() if name != key}


def is_dropped(text: str) -> bool:
    """Whether templates leave out such text: white space, or reasoning with its closing tag."""
    closed = [found.end() for found in _TAGS.finditer(text) if "/" in found[0]]
    return not text[closed[-1] if closed else 0 :].strip()


def words_offset(words: str) -> int:
    """The byte offset of a template's own words: far after any content, and different for different words, so that two models'
    tokens correspond there only if both templates write the same."""
    return WORDS + crc32(words.encode()) % (1 << 12) * (1 << 18)
