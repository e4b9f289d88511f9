"""The page's plots as plain data for Plotly, which the browser draws. Nothing in them is taken for markup."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POINTS = 500  # a curve with more is drawn by means of neighbours, and says so
_GRID = "rgba(128,136,144,0.25)"
_INK = "#808890"  # readable on a light and on a dark ground
SERIES = (
    "#8896a5",
    "#3b82c4",
    "#d9822b",
    "#3fa57a",
    "#b45bcf",
    "#c9547a",
)  # .c0 to .c5 of the page, the first the pivot's
_SFT, _HELD_OUT, _FUSION = SERIES[1], SERIES[4], SERIES[2]


@dataclass(frozen=True)
class Plot:
    """`caption`: what the page says below it."""

    name: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    caption: str = ""

    @property
    def height(self) -> int:
        return int(self.layout["height"])


def plain(text: str) -> str:
    """Text as Plotly shows it as it is: its labels know some tags and entities."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float) -> float | None:
    """With five digits, which is more than can be seen; a gap where it is not finite, as of a training that diverged."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def layout(title: str, height: int, **more: Any) -> dict[str, Any]:
    """What all plots have in common; `more` is added to it."""
    return {
        "title": {"text": plain(title), "font": {"size": 14}, "x": 0, "xref": "paper", "xanchor": "left"},
        "height": height,
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": _INK, "size": 11, "family": "system-ui, sans-serif"},
        "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
        "showlegend": False,
        **more,
    }


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "gridcolor": _GRID, "zeroline": False, "ticks": "", "automargin": True, **more}


def loss_figures(losses: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Plot]:
    """For each target the SFT term, in training and held out, and the fusion term apart from it, which has another scale."""
    figures = []
    for number, (target, entries) in enumerate(losses.items()):
        sft = "sft_loss" if any("sft_loss" in entry for entry in entries) else "loss"
        for key, title, curves in (
            ("sft", "SFT term", ((sft, "training", _SFT), ("eval_loss", "held out", _HELD_OUT))),
            ("fusion", "fusion term", (("fusion_loss", "training", _FUSION),)),
        ):
            found = [_curve(entries, *curve) for curve in curves]
            traces = [trace for trace, _ in found if trace["x"]]
            if traces:
                width = max(width for _, width in found)
                many = len(traces) > 1
                drawn = layout(
                    f"{target}: {title}",
                    260,
                    xaxis=axis("step"),
                    yaxis=axis("nats per response token"),
                    margin={"l": 50, "r": 10, "t": 40, "b": 40},
                    showlegend=many,
                    legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.16},
                )
                said = f"{target}, {title}: each point is the mean of up to {width} steps" if width > 1 else ""
                figures.append(Plot(f"{key}-{number}", traces, drawn, said))
    return figures


def _curve(entries: Sequence[Mapping[str, float]], key: str, name: str, colour: str) -> tuple[dict[str, Any], int]:
    """A trace, and of how many entries each of its points is the mean."""
    points = [(entry["step"], entry[key]) for entry in entries if key in entry]
    width = -(-len(points) // POINTS) or 1
    groups = [points[first : first + width] for first in range(0, len(points), width)]
    marks = key == "eval_loss" or len(groups) < 30
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if marks else "lines",
        "name": name,
        "x": [group[-1][0] for group in groups],
        "y": [number(sum(y for _, y in group) / len(group)) for group in groups],
        "line": {"color": colour, "width": 2},
        "marker": {"size": 5},
        "hovertemplate": "step %{x}: %{y:.4f}<extra></extra>",
    }
    return trace, width
