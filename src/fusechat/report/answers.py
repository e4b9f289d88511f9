"""What pivot, sources and the fused model answered to the same prompts, side by side."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

LONGEST = 6000  # characters of an answer or a message; what is longer is cut, and says so
_OPEN = 3  # cards that are shown without a click
_ALL, _SHORTEST = 500_000, 300  # characters on the page: what its size allows; with many answers each is cut earlier


@dataclass(frozen=True)
class Answer:
    """`kind`: pivot, source, fused or reference. `complete`: the model ended by itself. `missing`: why there is no answer."""

    kind: str
    name: str
    text: str
    complete: bool
    cut: bool
    missing: str | None = None


@dataclass(frozen=True)
class Card:
    """A prompt, all messages before the answer, and what each model said. `is_open`: shown without a click."""

    data: str
    prompt: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]
    is_open: bool = False


def cards(found: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, str]) -> list[Card]:
    """`found`: a model's name (pivot, source-NAME, fused) → its answers, the same prompts in the same order; `labels`: how the page
    calls it. Pivot first, fused last before the reference."""
    order = sorted(found, key=lambda name: (name == "fused", name != "pivot"))
    texts = sum(len(entry["prompt"]) + 2 for entries in found.values() for entry in entries)
    room = max(_SHORTEST, min(LONGEST, _ALL // max(1, texts)))
    result = []
    for entries in zip(*(found[name] for name in order), strict=True):
        first = entries[0]
        answers = [
            replace(
                _answer(
                    name.partition("-")[0], labels.get(name, name), entry["text"], room, complete=entry["complete"]
                ),
                missing=entry.get("missing"),
            )
            for name, entry in zip(order, entries, strict=True)
        ]
        if first.get("reference"):
            answers.append(_answer("reference", "held-out answer", first["reference"], room, complete=True))
        prompt = tuple((message["role"], cut(message["content"], room)[0]) for message in first["prompt"])
        result.append(Card(first["data"].removesuffix("-held-out"), prompt, tuple(answers)))
    return _opened(result)


def _opened(found: Sequence[Card]) -> list[Card]:
    """The cards, of which a few are open: the first one of each data set, then the second ones."""
    before, turns = Counter[str](), list[int]()
    for card in found:
        turns.append(before[card.data])
        before[card.data] += 1
    shown = sorted(range(len(found)), key=lambda place: (turns[place], place))[:_OPEN]
    return [replace(card, is_open=place in shown) for place, card in enumerate(found)]


def _answer(kind: str, name: str, text: str, room: int, *, complete: bool) -> Answer:
    shown, is_cut = cut(text, room)
    return Answer(kind, name, shown, complete, is_cut)


def cut(text: str, room: int) -> tuple[str, bool]:
    """The beginning of a text, and whether that is not all."""
    return (text, False) if len(text) <= room else (text[:room] + "…", True)
