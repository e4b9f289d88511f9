"""Merging coefficients as a heat map for each target: layers by modules, blue where it counts for more than its even share."""

import re
from collections.abc import Mapping
from typing import Any

OUTSIDE = "–"  # the row of tensors that are in no layer
CELL, HEADER = 17, 190  # pixels
HOVER = (
    "layer %{y}, %{x}<br>coefficient %{z:.4f}<br>update %{customdata[0]} (rms)<br>"
    "selected %{customdata[1]}, erased %{customdata[2]}<extra></extra>"
)


def heat_map(report: Mapping[str, Any]) -> str:
    """HTML of a plot without Plotly itself; empty where nothing was merged. `report`: merge_report.json."""
    from plotly.graph_objects import Figure, Heatmap
    from plotly.subplots import make_subplots

    tensors = {name: entry for name, entry in report["tensors"].items() if "coefficients" in entry}
    if not tensors:
        return ""
    rows, columns, cells = grid(list(tensors))
    targets = report["targets"]
    figure: Figure = make_subplots(rows=1, cols=len(targets), subplot_titles=targets, shared_yaxes=True)
    for number, target in enumerate(targets, 1):
        values = [[_coefficient(tensors, cells.get((row, column)), target) for column in columns] for row in rows]
        more = [[_more(tensors, cells.get((row, column)), target) for column in columns] for row in rows]
        trace = Heatmap(
            x=columns, y=rows, z=values, customdata=more, hovertemplate=HOVER, coloraxis="coloraxis", xgap=1, ygap=1
        )
        figure.add_trace(trace, row=1, col=number)
    even = 1 / len(targets)
    figure.update_layout(
        height=HEADER + CELL * len(rows),
        margin={"l": 55, "r": 15, "t": 45, "b": 120},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808890", "size": 11},
        coloraxis={"colorscale": "RdBu", "cmin": 0, "cmid": even, "cmax": min(1.0, 2 * even)},
    )
    figure.update_xaxes(tickangle=-60, showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, title_text="")
    figure.update_yaxes(title_text="layer", col=1)
    config = {"responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id="coefficients", config=config))


def grid(names: list[str]) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """Rows (layers), columns (modules, in the order met) and which tensor stands where."""
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    cells = {}
    for name in names:
        inside = re.search(r"\.(\d+)\.(.+)", name)
        row, module = (inside[1], inside[2]) if inside else (OUTSIDE, name.rpartition("model.")[2])
        module = module.removesuffix(".weight")
        rows[row] = columns[module] = None
        cells[row, module] = name
    return sorted(rows, key=lambda row: (row != OUTSIDE, int(row) if row != OUTSIDE else 0)), list(columns), cells


def _coefficient(tensors: Mapping[str, Any], name: str | None, target: str) -> float | None:
    return None if name is None else round(tensors[name]["coefficients"][target], 5)


def _more(tensors: Mapping[str, Any], name: str | None, target: str) -> list[str | float]:
    """What else is shown of a tensor where the mouse is."""
    if name is None:
        return []
    entry = tensors[name]
    size = f"{entry['updates'][target]:.3g}" if "updates" in entry else "–"
    return [size, round(entry["selected"], 4), round(entry["erased"], 4)]
