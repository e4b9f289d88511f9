"""Where in a rendered conversation its contents are, found by rendering it again with marks and comparing.

First every content is replaced by a mark: what stands between the marks is the template's own text, and between those pieces the
contents must follow, as they are or stripped. Where the template's own text depends on the contents (it takes reasoning out of
them, or writes calls of tools), marks are put around one answer at a time and everything else stays as it is.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from fusechat.data.messages import Message

OPEN, CLOSE = "\ue1a7", "\ue1a8"  # private use: in no text that one would train on
REASONING = ("reasoning_content", "reasoning", "thinking")
_STRIPPED = (str, str.strip, str.lstrip, str.rstrip)  # what templates do to a content, the commonest first
_TAGS = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(/?)THINK\]")
WORDS = 1 << 24  # bytes from here on are in a template's own words
Apply = Callable[[Sequence[Message]], str]


class UnrenderableError(Exception):
    """Why a conversation cannot be used with this template; the conversation is rejected and the reason counted."""


@dataclass(frozen=True)
class Place:
    """Characters of the rendered text: `begin`, `end` of what is the message's, `gap_end`: where the template's text after it
    ends. `skipped`: how many characters of the original content are gone from the front. `own`: how many characters from
    `begin` on are the content's; what follows is in the template's words (calls, reasoning as it writes it). `dropped`:
    reasoning is left out."""

    begin: int
    end: int
    gap_end: int
    skipped: int
    own: int
    dropped: bool = False


@dataclass(frozen=True)
class Response:
    """Characters of the rendered text. `asked`: where the asked prompt ends, the text after which a model is asked for this
    response; `begin`, `end`: the content; `gap_end`: where the template's text after it ends. `skipped`: how many characters
    of the original content the template stripped from the front. `own`: how many characters of the content are the message's
    own, as it has them; those after them are in the template's words, and counted from the byte `offset` on."""

    asked: int
    begin: int
    end: int
    gap_end: int
    skipped: int
    own: int
    offset: int = 0


@dataclass(frozen=True)
class Rendered:
    text: str
    responses: tuple[Response, ...]  # one for each assistant message that is learnt, in order
    system_folded: bool = False  # the template refuses the system message: it went in front of the first user message
    marks: frozenset[str] = frozenset()  # what the template leaves out, by the names of `left_out.py`


def places(messages: Sequence[Message], text: str, apply: Apply) -> list[Place]:
    """One for each message. Raises UnrenderableError unless each stands in the text once, in order, as it is or stripped."""
    return _marked(messages, text, apply, range(len(messages)))


def _marked(messages: Sequence[Message], text: str, apply: Apply, which: Sequence[int]) -> list[Place]:
    """Of these messages, all others being as they are."""
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
    """`content` as it stands at `cursor`, whole or stripped, with the template's `following` text after it."""
    for strip in _STRIPPED:
        candidate = strip(content)
        if text.startswith(candidate + following, cursor):
            return candidate
    return None


def response_places(
    messages: Sequence[Message], text: str, apply: Apply, *, asked: Callable[[int], int | None], end_text: str | None
) -> dict[int, Place]:
    """Of the messages that are learnt, where the template's own text depends on what they hold. `asked`: where the prompt that asks
    for a message ends, None where the text does not begin with it; `end_text`: what ends a turn. Raises UnrenderableError."""
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
    """How much of the text a template writes for the first messages: what follows is of those after them, their headers too. All
    of it where the text does not begin so."""
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
        before = limit if not message.content.strip() else place.begin  # of a call alone nothing says where it begins
        kept = told in text[asked or 0 : before]
        place = _from_reasoning(place, text, told, asked) if kept else replace(place, dropped=True)
    if has_calls:
        at = text.find(end_text, place.end, limit) if end_text else -1
        end = at if at >= 0 else place.end + len(text[place.end : limit].rstrip())
        place = replace(place, end=end)
    return place


def _from_reasoning(place: Place, text: str, reasoning: str, asked: int | None) -> Place:
    """From where the template writes the reasoning on, in its own words."""
    begin = text.rfind(reasoning, 0, place.begin) if asked is None else asked
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    return replace(place, begin=begin, skipped=0, own=0)


def _answer(messages: Sequence[Message], index: int, text: str, apply: Apply, asked: int | None) -> Place:
    """Where a content stands: whole, or what follows the reasoning in it, which the template writes in its own way or drops."""
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
    """What of a content may be its answer: all of it, or what follows reasoning; with the white space around it, or without."""
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
    """Whether a part of a content is such as templates leave out: white space, or reasoning with the tag that ends it."""
    closed = [found.end() for found in _TAGS.finditer(text) if "/" in found[0]]
    return not text[closed[-1] if closed else 0 :].strip()


def words_offset(words: str) -> int:
    """Where bytes that are in a template's own words are counted from: a place far after any content, and another one for other
    words, so that two models' tokens there correspond only where both templates write the same."""
    return WORDS + crc32(words.encode()) % (1 << 12) * (1 << 18)
