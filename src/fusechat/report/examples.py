"""A few prompts with all their candidates: some of which the choice was unsure, some of which it was sure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat.generate.choose import Candidate, choose, likelihoods
from fusechat.recipe.generate import Choose
from fusechat.report.answers import cut
from fusechat.report.authors import Line

EXAMPLES = 5
CANDIDATES, MESSAGES = 12, 6  # of an example at most
FOLDED = 300  # characters; what is longer, or has more lines, is opened by a click
_LINES = 6
_LONGEST, _SHORTEST, _ALL = 6000, 300, 150_000  # characters of a text, and of all of them: what the page's size allows


@dataclass(frozen=True)
class Text:
    """`opening`: the beginning of a long one, empty of a short one. `cut`: more of it is not on the page."""

    text: str
    opening: str
    cut: bool


@dataclass(frozen=True)
class Said:
    """A candidate. `authors`: the one that it counts for first; `samples`: how many answers it is; `scores`: nats per byte by each
    model, in the example's order; `mean`: over the models that scored all, None where there are none; `judged`: None as well."""

    text: Text
    authors: tuple[str, ...]
    samples: int
    scores: tuple[float | None, ...]
    mean: float | None
    judged: float | None
    is_chosen: bool


@dataclass(frozen=True)
class Example:
    """`told`: how sure the choice was; `earlier` messages, and `more` candidates, are not shown."""

    data: str
    prompt: tuple[tuple[str, Text], ...]
    earlier: int
    told: str
    kept: bool
    models: tuple[str, ...]
    candidates: tuple[Said, ...]
    more: int


def pick(lines: Iterable[Line], how: Choose, seed: int) -> dict[int, str]:
    """Which lines are shown, from the least sure to the surest, and how sure each is among its like. Prompts with several
    candidates come first: one alone says little of the choice."""
    several: list[tuple[float, str, int]] = []
    alone: list[tuple[float, str, int]] = []
    for number, (line, candidates) in enumerate(lines):
        prompt = line["prompt_id"]
        choice = choose(candidates, how.way, source=how.source, seed=seed, prompt=prompt) if candidates else None
        if choice is not None:
            (several if len(candidates) > 1 else alone).append((choice.sureness, prompt, number))
    found = {number: _sureness(place, len(several) - 1) for number, place in _spread(several, EXAMPLES).items()}
    found |= dict.fromkeys(_spread(alone, EXAMPLES - len(found)), "one candidate")
    return dict.fromkeys(found, "at random") if how.way == "random" else found


def _spread(ranked: list[tuple[float, str, int]], count: int) -> dict[int, int]:
    """So many lines at equal distances, the last and the first among them, and which place each has."""
    ranked.sort()
    last, count = len(ranked) - 1, min(count, len(ranked))
    places = [last - round(step * last / max(1, count - 1)) for step in reversed(range(count))]
    return {ranked[place][2]: place for place in places}


def _sureness(place: int, last: int) -> str:
    if place == last:
        return "surest" if last else "one choice"
    return f"surer than {place / last:.0%}" if place else "least sure"


def examples(lines: Iterable[Line], picked: Mapping[int, str]) -> list[Example]:
    """The picked lines, in their order. With many candidates each text is shorter."""
    found = {number: line for number, line in enumerate(lines) if number in picked}
    texts = sum(min(len(line["messages"]), MESSAGES) + min(len(some), CANDIDATES) for line, some in found.values())
    room = max(_SHORTEST, min(_LONGEST, _ALL // max(1, texts)))
    return [_example(*found[number], told, room) for number, told in picked.items()]


def _example(line: Mapping[str, Any], candidates: Sequence[Candidate], told: str, room: int) -> Example:
    models = tuple(dict.fromkeys(name for one in candidates for name in one.scores))
    means = likelihoods(candidates)
    said = [
        Said(
            text=_text(one.text, room),
            authors=tuple(dict.fromkeys([line["author"] if place == line["chosen"] else one.author, *one.samples])),
            samples=sum(one.samples.values()),
            scores=tuple(one.scores.get(model) for model in models),
            mean=mean if math.isfinite(mean) else None,
            judged=one.judged,
            is_chosen=place == line["chosen"],
        )
        for place, (one, mean) in enumerate(zip(candidates, means, strict=True))
    ]
    said.sort(key=lambda one: not one.is_chosen)
    messages = [(one["role"], _text(one["content"], room)) for one in line["messages"]]
    return Example(
        data=", ".join(line.get("data", ())),
        prompt=tuple(messages[-MESSAGES:]),
        earlier=max(0, len(messages) - MESSAGES),
        told=told,
        kept=line["kept"],
        models=models,
        candidates=tuple(said[:CANDIDATES]),
        more=max(0, len(said) - CANDIDATES),
    )


def _text(text: str, room: int) -> Text:
    shown, is_cut = cut(text, room)
    lines = shown.splitlines()
    opening = cut("\n".join(lines[:_LINES]), FOLDED)[0]
    is_long = len(shown) > FOLDED or len(lines) > _LINES
    return Text(shown, opening.rstrip("…") + "…" if is_long else "", is_cut)
