"""On-policy rounds: figures of each round's answers, alarms, and the answers to one prompt round by round."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat.report.plots import SERIES, Plot, axis, layout, number
from fusechat.run.shards import Shards
from fusechat.run.steps import Step

_SHARES = (("share_kept", "rows kept"), ("ended", "answers that end"), ("repetition", "repetition"))
_MOST = 2000  # characters of an answer that the page shows


@dataclass(frozen=True)
class Answer:
    """`place`: which round gave it."""

    place: str
    text: str
    ended: bool
    cut: bool


@dataclass(frozen=True)
class Rounds:
    """Of a target. `round`: whose model it is, 0 for the first training; `of`: how many there were to be; `figures`: of each
    round's answers, with `place`, its name; `prompt`: the one whose `answers` are shown."""

    target: str
    round: int
    of: int
    figures: list[dict[str, Any]]
    prompt: str
    answers: list[Answer]


def rounds_of(target: str, step: Step, prompts: Mapping[str, str]) -> Rounds:
    """Of the step that ended a target's rounds. `prompts`: their texts, by key."""
    counts = (step.manifest() or {})["counts"]
    places = [f"round {number}" for number in range(1, counts["of"] + 1)] + ["afterwards"]
    figures = [
        {**found, "place": place} for found, place in zip(counts["rounds"], places, strict=True) if found["answers"]
    ]
    given = [step.upstream[f"kept/{at}"].upstream["answers"].directory for at in range(1, len(places) + 1)]
    rows = {
        place: {row["id"]: row for part in Shards(directory, "answers") for row in part}
        for place, directory in zip(places, given, strict=True)
    }
    asked = [key for key in dict.fromkeys(key for found in rows.values() for key in found) if key in prompts]
    shown = max(asked, key=lambda key: sum(key in found for found in rows.values()), default="")
    answers = [
        Answer(place, found[shown]["text"][:_MOST], found[shown]["end"] is not None, len(found[shown]["text"]) > _MOST)
        for place, found in rows.items()
        if shown in found
    ]
    return Rounds(target, counts["round"], counts["of"], figures, prompts.get(shown, ""), answers)


def losses_of(step: Step) -> list[dict[str, float]]:
    """The log of all rounds' training."""
    files = [one.directory / "losses.jsonl" for key, one in step.upstream.items() if key.startswith("model/")][1:]
    return [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines()]


def round_figures(every: Sequence[Rounds]) -> list[Plot]:
    """For each target its shares, round by round."""
    figures = []
    for at, one in enumerate(every):
        traces = [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [found["place"] for found in one.figures],
                "y": [None if found[key] is None else number(found[key]) for found in one.figures],
                "line": {"color": colour, "width": 2},
                "marker": {"size": 5},
                "hovertemplate": "%{x}: %{y:.1%}<extra></extra>",
            }
            for (key, name), colour in zip(_SHARES, SERIES[1:], strict=False)
        ]
        drawn = layout(
            f"{one.target}: answers of each round",
            260,
            xaxis=axis(),
            yaxis=axis("share", range=[0, 1.02], tickformat=".0%"),
            margin={"l": 50, "r": 10, "t": 40, "b": 40},
            showlegend=True,
            legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.16},
        )
        figures.append(Plot(f"rounds-{at}", traces, drawn))
    return figures
