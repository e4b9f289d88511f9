"""Merging coefficients as a heat map for each target: layers by modules, blue where it counts for more than its even share."""

import re
from collections.abc import Mapping
from typing import Any

from fusechat.report.figures import Figure, axis, layout, number, plain

OUTSIDE = "–"  # the row of tensors that are in no layer
CELL, HEADER = 15, 190  # pixels
HOVER = (
    "layer %{y}, %{x}<br>coefficient %{z:.4f}<br>update %{customdata[0]} (rms)<br>"
    "selected %{customdata[1]}, erased %{customdata[2]}<extra></extra>"
)
_SCALE = [[0, "#c2570c"], [0.5, "#e8e6e3"], [1, "#2563c9"]]


def heat_maps(report: Mapping[str, Any]) -> list[Figure]:
    """A figure a target, none where nothing was merged. `report`: merge_report.json."""
    tensors = {name: entry for name, entry in report["tensors"].items() if "coefficients" in entry}
    if not tensors:
        return []
    rows, columns, cells = grid(list(tensors))
    targets = report["targets"]
    even = 1 / len(targets)
    figures = []
    for place, target in enumerate(targets):
        trace = {
            "type": "heatmap",
            "x": [plain(column) for column in columns],
            "y": rows,
            "z": [[_coefficient(tensors, cells.get((row, column)), target) for column in columns] for row in rows],
            "customdata": [[_more(tensors, cells.get((row, column)), target) for column in columns] for row in rows],
            "hovertemplate": HOVER,
            "hoverongaps": False,
            "xgap": 1,
            "ygap": 1,
            "colorscale": _SCALE,
            "zmin": 0,
            "zmid": even,
            "zmax": min(1.0, 2 * even),
            "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 0.9},
        }
        mean = report["mean_coefficients"][target]
        drawn = layout(
            f"{target}: {mean:.4f} on average",
            HEADER + CELL * len(rows),
            xaxis=axis(tickangle=-60, showgrid=False, type="category"),
            yaxis=axis("layer", autorange="reversed", type="category", showgrid=False, dtick=max(1, len(rows) // 20)),
            margin={"l": 45, "r": 10, "t": 40, "b": 110},
        )
        figures.append(Figure(f"coefficients-{place}", [trace], drawn))
    return figures


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
    return None if name is None else number(tensors[name]["coefficients"][target])


def _more(tensors: Mapping[str, Any], name: str | None, target: str) -> list[str | float]:
    """What else is shown of a tensor where the mouse is."""
    if name is None:
        return []
    entry = tensors[name]
    size = f"{entry['updates'][target]:.3g}" if "updates" in entry else "–"
    return [size, round(entry["selected"], 4), round(entry["erased"], 4)]
