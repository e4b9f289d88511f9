"""The heat maps of merging coefficients: every tensor in its cell, with its numbers."""

from typing import Any

import pytest

from fusechat.report import coefficients
from fusechat.report.coefficients import OUTSIDE, grid, heat_maps


def entry(one: float, two: float, **more: Any) -> dict[str, Any]:
    return {"coefficients": {"one": one, "two": two}, "selected": 0.1, "erased": 0.25, **more}


REPORT = {
    "targets": ["one", "two"],
    "mean_coefficients": {"one": 0.525, "two": 0.475},
    "tensors": {
        "model.embed_tokens.weight": entry(0.4, 0.6),
        "model.layers.0.mlp.up_proj.weight": entry(0.3, 0.7, updates={"one": 0.00123, "two": 0.5}, merged_update=0.1),
        "model.layers.10.mlp.up_proj.weight": entry(0.9, 0.1),
        "model.layers.2.self_attn.q_proj.bias": entry(0.5, 0.5),
        "model.layers.2.buffer": {"copied": True},
    },
}


def test_layers_are_in_their_order_and_modules_in_columns() -> None:
    rows, columns, cells = grid([name for name, entry in REPORT["tensors"].items() if "coefficients" in entry])  # type: ignore[attr-defined]
    assert rows == [OUTSIDE, "0", "2", "10"]
    assert columns == ["embed_tokens", "mlp.up_proj", "self_attn.q_proj.bias"]
    assert cells["10", "mlp.up_proj"] == ["model.layers.10.mlp.up_proj.weight"]
    assert len(cells) == 4


def test_every_cell_has_the_numbers_of_its_tensor() -> None:
    one, two = heat_maps(REPORT)
    assert one.data[0]["z"] == [[0.4, None, None], [None, 0.3, None], [None, None, 0.5], [None, 0.9, None]]
    assert two.data[0]["z"] == [[0.6, None, None], [None, 0.7, None], [None, None, 0.5], [None, 0.1, None]]
    assert one.data[0]["customdata"][1][1] == ["0.00123", 0.1, 0.25]
    assert two.data[0]["customdata"][1][1] == ["0.5", 0.1, 0.25]
    assert one.data[0]["customdata"][0][0] == ["–", 0.1, 0.25], "a method without updates"
    assert [figure.layout["title"]["text"] for figure in (one, two)] == [
        "one: 0.5250 on average",
        "two: 0.4750 on average",
    ]
    assert one.data[0]["zmid"] == 0.5


def test_nothing_is_drawn_where_nothing_was_merged() -> None:
    assert heat_maps({"targets": ["one"], "tensors": {"buffer": {"copied": True}}}) == []


def test_a_name_is_no_markup() -> None:
    report = {**REPORT, "tensors": {"model.<b>bold</b>&amp;": entry(0.5, 0.5)}}
    assert heat_maps(report)[0].data[0]["x"] == ["&lt;b&gt;bold&lt;/b&gt;&amp;amp;"]


def test_of_very_many_tensors_those_of_one_name_but_for_a_number_share_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"model.layers.0.experts.{number}.up.weight": entry(0.2 * number, 0.1) for number in range(4)}
    report = {**REPORT, "tensors": {**tensors, "model.norm.weight": entry(0.5, 0.5)}}
    monkeypatch.setattr(coefficients, "MOST", 9)
    one, _ = heat_maps(report)
    assert one.data[0]["x"] == ["experts.*.up", "norm"]
    assert one.data[0]["z"] == [[None, 0.5], [0.3, None]]
    assert "(means)" in one.data[0]["hovertemplate"]
    monkeypatch.setattr(coefficients, "MOST", 10)
    assert len(heat_maps(report)[0].data[0]["x"]) == 5
