"""Who answered best where: what became of each author's answers to each set of prompts, counted in one pass over all prompts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusechat.generate.choose import JUDGED, Candidate, agreement, likelihoods
from fusechat.recipe.schema import PIVOT
from fusechat.report.plots import SERIES, Plot, axis, layout, number, plain

ALL, ALL_SETS = "", "all prompts"  # the place of all of them, and what it is called
SETS = 24  # that the page shows, those with the most prompts
_OWN = ("self", "random")  # ways to choose for which an author's answers are scored by itself only
_SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "x": "✖", "star": "★"}
_LABEL = 20  # characters of a name in a plot
Line = tuple[Mapping[str, Any], Sequence[Candidate]]  # of `candidates.jsonl`


@dataclass
class Standing:
    """An author on a set of prompts. `asked`: how many of them; `answered`: with a candidate; `best`: whose chosen text it gave,
    alone or with others; `taught`: whose answer is kept, and counts as its own. `total`: of the scores of `scored` candidates."""

    asked: int = 0
    answered: int = 0
    best: int = 0
    taught: int = 0
    total: float = 0.0
    scored: int = 0

    @property
    def score(self) -> float | None:
        return self.total / self.scored if self.scored else None

    @property
    def share(self) -> float | None:
        return self.best / self.asked if self.asked else None


@dataclass
class Place:
    """A set of prompts, or all of them. `kept`: to how many an answer is learnt; `several`: how many several authors answered, and
    to how many of these all answers are the `same`."""

    data: str
    prompts: int = 0
    kept: int = 0
    several: int = 0
    same: int = 0
    authors: dict[str, Standing] = field(default_factory=dict)


def places(lines: Iterable[Line], authors: Sequence[str], way: str) -> list[Place]:
    """Of all prompts, then, of several sets, of each of these. `way`: how answers were chosen, which says what their score is."""
    found: dict[str, Place] = {}
    for line, candidates in lines:
        scores = [_scores(one, mean, way) for one, mean in zip(candidates, likelihoods(candidates), strict=True)]
        agree = agreement([candidates])
        for data in (ALL, *line.get("data", ())):  # older versions do not tell the sets
            place = found.setdefault(data, Place(data, authors={name: Standing() for name in authors}))
            place.prompts += 1
            place.kept += line["kept"]
            place.several += agree is not None
            place.same += agree == 1
            for name, standing in place.authors.items():
                _count(standing, name, line, candidates, scores)
    return list(found.values())[: None if len(found) > 2 else 1]


def _scores(one: Candidate, mean: float, way: str) -> dict[str, float | None]:
    """A candidate's score for each of its authors, as `choose` has it: nats per byte, or what is made of it."""
    if way in JUDGED:
        return dict.fromkeys(one.samples, one.judged)
    own = way in _OWN or not math.isfinite(mean)
    return {name: one.own.get(name) if own else mean for name in one.samples}


def _count(
    standing: Standing,
    name: str,
    line: Mapping[str, Any],
    candidates: Sequence[Candidate],
    scores: Sequence[Mapping[str, float | None]],
) -> None:
    """Adds a prompt to what is counted of an author."""
    mine = [place for place, one in enumerate(candidates) if name in one.samples]
    known = [score for place in mine if (score := scores[place][name]) is not None]
    standing.asked += bool(mine) or name in line["no_candidates"]
    standing.answered += bool(mine)
    standing.best += line["chosen"] in mine
    standing.taught += bool(line["kept"] and line["author"] == name)
    standing.total += sum(known)
    standing.scored += len(known)


def largest(found: Sequence[Place]) -> list[Place]:
    """Of very many sets those with the most prompts, in their order; all prompts first."""
    ranked = sorted(found[1:], key=lambda place: -place.prompts)[:SETS]
    return [*found[:1], *(place for place in found[1:] if place in ranked)]


def author_figures(found: Sequence[Place], unit: str) -> list[Plot]:
    """Share and mean score of each author: a row for each set of prompts, or of a single set for each author. `unit`: of scores."""
    shares = {place.data: {name: one.share for name, one in place.authors.items()} for place in found}
    scores = {place.data: {name: one.score for name, one in place.authors.items()} for place in found}
    percent = {data: {name: _percent(share) for name, share in each.items()} for data, each in shares.items()}
    best = _dots("best", "Gave the chosen answer", percent, "% of its prompts", most=100)
    return [best, _dots("score", "Mean score", scores, unit)]


def colour_numbers(names: Iterable[str]) -> dict[str, int]:
    """A colour for each model that teaches or answers, the pivot's the first."""
    ranked = sorted(dict.fromkeys(names), key=lambda name: name != PIVOT)
    return {name: number for number, name in enumerate(ranked, PIVOT not in ranked)}


@dataclass(frozen=True)
class Mark:
    """How an author is drawn: in plots by Plotly's name of a symbol, next to names by the character that looks like it."""

    symbol: str
    character: str
    colour: str


def marks(authors: Sequence[str]) -> dict[str, Mark]:
    """Colours and symbols that differ for as many authors as there are."""
    numbers, symbols = colour_numbers(authors), list(_SYMBOLS.items())
    return {name: Mark(*symbols[numbers[name] % len(symbols)], SERIES[numbers[name] % len(SERIES)]) for name in authors}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _dots(
    name: str, title: str, values: Mapping[str, Mapping[str, float | None]], unit: str, most: float = 0.0
) -> Plot:
    """A dot for each author in the row of each place, a little apart from the others; of a single place in a row of its own. The
    scale begins at 0 or below, and ends at `most`, or where the last dot is."""
    authors = list(next(iter(values.values())))
    drawn, alone = marks(authors), len(values) == 1
    rows = authors if alone else [data or ALL_SETS for data in values]
    traces = []
    for index, author in enumerate(authors):
        first = index if alone else 0.5 * ((index + 0.5) / len(authors) - 0.5)
        points = [(first + row, each[author]) for row, each in enumerate(values.values())]
        known = [(number(x), y) for y, x in points if x is not None and math.isfinite(x)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(author),
                "x": [x for x, _ in known],
                "y": [y for _, y in known],
                "marker": {"size": 10, "color": drawn[author].colour, "symbol": drawn[author].symbol},
                "hovertemplate": f"{plain(author)}: %{{x}}<extra></extra>",
            }
        )
    every = [0.0, *(x for each in values.values() for x in each.values() if x is not None and math.isfinite(x))]
    room = 0.04 * ((max(every) - min(every)) or 1.0)
    reach = [number(min(every) - room), number((most or max(every)) + room)]
    names = [plain(row if len(row) <= _LABEL else row[:_LABEL] + "…") for row in rows]
    ticks: dict[str, Any] = {"tickvals": list(range(len(rows))), "ticktext": names, "range": [len(rows) - 0.5, -0.5]}
    margin = {"l": 50, "r": 10, "t": 40, "b": 45}
    look = layout(title, 95 + 30 * len(rows), xaxis=axis(unit, range=reach), yaxis=axis(**ticks), margin=margin)
    return Plot(f"authors-{name}", traces, look)
