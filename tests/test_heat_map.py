"""The heat map of merging coefficients: every tensor in its cell, with its numbers."""

import json
import re
from typing import Any

from fusechat.report.coefficients import OUTSIDE, grid, heat_map


def entry(one: float, two: float, **more: Any) -> dict[str, Any]:
    return {"coefficients": {"one": one, "two": two}, "selected": 0.1, "erased": 0.25, **more}


REPORT = {
    "targets": ["one", "two"],
    "tensors": {
        "model.embed_tokens.weight": entry(0.4, 0.6),
        "model.layers.0.mlp.up_proj.weight": entry(0.3, 0.7, updates={"one": 0.00123, "two": 0.5}, merged_update=0.1),
        "model.layers.10.mlp.up_proj.weight": entry(0.9, 0.1),
        "model.layers.2.self_attn.q_proj.bias": entry(0.5, 0.5),
        "model.layers.2.buffer": {"copied": True},
    },
}


def figure(page: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout, as the page hands them to Plotly."""
    call = re.search(r'Plotly\.newPlot\(\s*"coefficients",\s*', page)
    assert call
    decoder = json.JSONDecoder()
    traces, end = decoder.raw_decode(page, call.end())
    layout, _ = decoder.raw_decode(page, re.compile(r",\s*").match(page, end).end())  # type: ignore[union-attr]
    return traces, layout


def test_layers_are_in_their_order_and_modules_in_columns() -> None:
    rows, columns, cells = grid([name for name, entry in REPORT["tensors"].items() if "coefficients" in entry])  # type: ignore[attr-defined]
    assert rows == [OUTSIDE, "0", "2", "10"]
    assert columns == ["embed_tokens", "mlp.up_proj", "self_attn.q_proj.bias"]
    assert cells["10", "mlp.up_proj"] == "model.layers.10.mlp.up_proj.weight"
    assert len(cells) == 4


def test_every_cell_has_the_numbers_of_its_tensor() -> None:
    traces, layout = figure(heat_map(REPORT))
    assert [trace["z"] for trace in traces] == [
        [[0.4, None, None], [None, 0.3, None], [None, None, 0.5], [None, 0.9, None]],
        [[0.6, None, None], [None, 0.7, None], [None, None, 0.5], [None, 0.1, None]],
    ]
    assert traces[0]["customdata"][1][1] == ["0.00123", 0.1, 0.25]
    assert traces[1]["customdata"][1][1] == ["0.5", 0.1, 0.25]
    assert traces[0]["customdata"][0][0] == ["–", 0.1, 0.25], "a method without updates"
    assert [each["text"] for each in layout["annotations"]] == ["one", "two"]
    assert layout["coloraxis"]["cmid"] == 0.5


def test_nothing_is_drawn_where_nothing_was_merged() -> None:
    assert heat_map({"targets": ["one"], "tensors": {"buffer": {"copied": True}}}) == ""


def test_a_hostile_name_stays_text() -> None:
    name = "</script><script>alert(1)</script>"
    report = {"targets": ["one", "two"], "tensors": {f"model.{name}": entry(0.5, 0.5)}}
    page = heat_map(report)
    assert "alert(1)" in page
    assert "<script>alert(1)" not in page
