"""Merging coefficients as a heat map for each target: layers by modules, blue where it counts for more than its even share.

A cell is a tensor. Of a model with very many, as of many experts, those that differ by a number only share a cell, with their mean.
"""

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from fusechat.merge.report import is_copy
from fusechat.report.plots import Plot, axis, layout, number, plain

OUTSIDE = "–"  # the row of tensors that are in no layer
CELL, HEADER = 15, 190  # pixels
MOST = 20_000  # cells of all targets: what the page's size allows
HOVER = (
    "layer %{y}, %{x}<br>coefficient %{z:.4f}<br>update %{customdata[0]} (rms)<br>"
    "selected %{customdata[1]}, erased %{customdata[2]}<extra></extra>"
)
_SCALE = [[0, "#c2570c"], [0.5, "#e8e6e3"], [1, "#2563c9"]]


def heat_maps(report: Mapping[str, Any]) -> list[Plot]:
    """A figure a target, none where nothing was merged, or one target copied. `report`: merge_report.json."""
    tensors = {name: entry for name, entry in report["tensors"].items() if "coefficients" in entry}
    if not tensors or is_copy(report):
        return []
    targets = report["targets"]
    joined = len(tensors) * len(targets) > MOST
    rows, columns, cells = grid(list(tensors), joined=joined)
    even = 1 / len(targets)
    figures = []
    for place, target in enumerate(targets):
        trace = {
            "type": "heatmap",
            "x": [plain(column) for column in columns],
            "y": rows,
            "z": [[_coefficient(tensors, cells.get((row, column)), target) for column in columns] for row in rows],
            "customdata": [[_more(tensors, cells.get((row, column)), target) for column in columns] for row in rows],
            "hovertemplate": HOVER.replace("<br>", " (means)<br>", 1) if joined else HOVER,
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
        figures.append(Plot(f"coefficients-{place}", [trace], drawn))
    return figures


def grid(names: list[str], *, joined: bool = False) -> tuple[list[str], list[str], dict[tuple[str, str], list[str]]]:
    """Rows (layers), columns (modules, in the order met) and which tensors stand where: one, or `joined` those of one name but for
    a number."""
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    cells: dict[tuple[str, str], list[str]] = {}
    for name in names:
        inside = re.search(r"\.(\d+)\.(.+)", name)
        row, module = (inside[1], inside[2]) if inside else (OUTSIDE, name.rpartition("model.")[2])
        module = module.removesuffix(".weight")
        if joined:
            module = re.sub(r"\.\d+(?=\.|$)", ".*", module)
        rows[row] = columns[module] = None
        cells.setdefault((row, module), []).append(name)
    return sorted(rows, key=lambda row: (row != OUTSIDE, int(row) if row != OUTSIDE else 0)), list(columns), cells


def _coefficient(tensors: Mapping[str, Any], names: list[str] | None, target: str) -> float | None:
    return number(fmean(tensors[name]["coefficients"][target] for name in names)) if names else None


def _more(tensors: Mapping[str, Any], names: list[str] | None, target: str) -> list[str | float]:
    """What else is shown of a cell where the mouse is."""
    if not names:
        return []
    entries = [tensors[name] for name in names]
    sizes = [entry["updates"][target] for entry in entries if "updates" in entry]
    shares = [round(fmean(entry[key] for entry in entries), 4) for key in ("selected", "erased")]
    return [f"{fmean(sizes):.3g}" if sizes else "–", *shares]
