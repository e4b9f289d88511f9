"""A figure for each table, in the report's style: exact match and bits per byte with their intervals, as SVG."""

import asyncio
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.report.plots import axis, layout
from miniature.rows import PIVOT_ROW, Row, Table
from miniature.scores import BITS, EXACT, Scores

BLUE, ORANGE, VIOLET, GREEN, GREY = "#3b82c4", "#d9822b", "#b45bcf", "#3f9b6c", "#808890"
COLOURS = (GREY, BLUE, VIOLET, ORANGE, GREEN)
TITLES = {EXACT: "exact match, %", BITS: "bits per byte"}


def figure(table: Table, rows: Mapping[str, Row], scores: Scores) -> dict[str, Any]:
    """Plotly's data and layout, of the rows that are shown."""
    return _curves(table, scores) if table.x else _dots(table, rows, scores)


def _dots(table: Table, rows: Mapping[str, Row], scores: Scores) -> dict[str, Any]:
    """A row of the table is a row of the figure; lines stand at the pivot and at gold answers."""
    labels = list(rows)[::-1]
    data, shapes = [], []
    for number, metric in enumerate((EXACT, BITS), 1):
        found = [scores.mean(rows[label], table.seeds, metric) for label in labels]
        scale = 100 if metric == EXACT else 1
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [scale * one.mean for one in found],
                "y": labels,
                "error_x": {"array": [scale * (one.half or 0) for one in found], "thickness": 1.5, "width": 3},
                "marker": {"color": BLUE, "size": 7},
                "xaxis": f"x{number}",
                "yaxis": "y",
            }
        )
        for row, colour, dash in ((PIVOT_ROW, GREY, "dot"), (table.gold, ORANGE, "dash")):
            at = scale * scores.mean(row, table.seeds, metric).mean
            place = {"xref": f"x{number}", "yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1}
            shapes.append({"type": "line", **place, "line": {"color": colour, "dash": dash, "width": 1.5}})
    widths = {"xaxis": [0, 0.47], "xaxis2": [0.53, 1]}
    axes = {
        key: axis(title, domain=domain, side="bottom", anchor="y")
        for (key, domain), title in zip(widths.items(), TITLES.values(), strict=True)
    }
    said = f"{table.title} (dotted: pivot; dashed: gold answers)"
    height = 110 + 24 * len(labels)
    return {
        "data": data,
        "layout": layout(said, height, width=760, shapes=shapes, yaxis=axis(), margin={"t": 40, "r": 10}, **axes),
    }


def _curves(table: Table, scores: Scores) -> dict[str, Any]:
    """A curve for each way to learn, over what the table varies."""
    places = list(dict.fromkeys(label.partition(": ")[0] for label in table.rows))
    ways = list(dict.fromkeys(label.partition(": ")[2] for label in table.rows))
    data, shapes = [], []
    for number, metric in enumerate((EXACT, BITS), 1):
        scale = 100 if metric == EXACT else 1
        pivot = scale * scores.mean(PIVOT_ROW, table.seeds, metric).mean
        place = {"xref": f"x{number} domain", "yref": f"y{number}", "x0": 0, "x1": 1, "y0": pivot, "y1": pivot}
        shapes.append({"type": "line", **place, "line": {"color": GREY, "dash": "dot", "width": 1.5}})
        for way, colour in zip(ways, COLOURS[: len(ways)], strict=True):
            found = [scores.mean(table.rows[f"{place}: {way}"], table.seeds, metric) for place in places]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": way,
                    "showlegend": number == 1,
                    "x": places,
                    "y": [scale * one.mean for one in found],
                    "error_y": {"array": [scale * (one.half or 0) for one in found], "thickness": 1.2, "width": 3},
                    "line": {"color": colour, "width": 2},
                    "xaxis": f"x{number}",
                    "yaxis": f"y{number}",
                }
            )
    axes = {
        "xaxis": axis(table.x, domain=[0, 0.44], type="category"),
        "xaxis2": axis(table.x, domain=[0.56, 1], type="category", anchor="y2"),
        "yaxis": axis(TITLES[EXACT]),
        "yaxis2": axis(TITLES[BITS], anchor="x2"),
    }
    legend = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.3, "yanchor": "top"}
    return {
        "data": data,
        "layout": layout(
            "(dotted: pivot)",
            340,
            width=760,
            shapes=shapes,
            showlegend=True,
            legend=legend,
            margin={"t": 40, "r": 10},
            **axes,
        ),
    }


def same_names(svg: str, name: str) -> str:
    """A figure whose parts are named after it, where Plotly draws their names at random: one figure, one file."""
    found = re.search(r'id="defs-([0-9a-f]{6})"', svg)
    return re.sub(r"\btrace[0-9a-f]{6}\b", "trace", svg.replace(found[1], name) if found else svg)


def write(figures: dict[str, dict[str, Any]], directory: Path) -> None:
    """NAME.svg each, drawn by Plotly in a headless browser that is on this machine."""
    import kaleido

    browser = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)

    async def draw() -> None:
        page = kaleido.PageGenerator(mathjax=False)
        async with kaleido.Kaleido(n=1, path=browser, page_generator=page) as drawer:
            for name, one in figures.items():
                path = directory / f"{name}.svg"
                await drawer.write_fig(one, str(path))
                path.write_text(same_names(path.read_text(encoding="utf-8"), name), encoding="utf-8")

    directory.mkdir(parents=True, exist_ok=True)
    asyncio.run(draw())
