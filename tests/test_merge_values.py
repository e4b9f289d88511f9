"""What a parameter's setting means for one tensor: by hand, by NumPy's interpolation, and laws that hold for all lists."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import each
from fusechat.merge.parameters import DENSITY, SEED, WEIGHT, Parameter
from fusechat.merge.values import layer_of, position, read_setting, resolve

FLAG = Parameter("normalize", kind=bool, default=True)
Q, UP, HEAD = "self_attn.q_proj.weight", "mlp.up_proj.weight", "lm_head.weight"
numbers = st.floats(-10, 10, allow_nan=False)


def value(raw: Any, tensor: str, layers: int, parameter: Parameter = WEIGHT) -> float | bool | None:
    setting, wrong = read_setting(raw, parameter)
    assert wrong == []
    return resolve([setting], tensor, position(tensor, layers))


def over_layers(raw: Any, layers: int, parameter: Parameter = WEIGHT, part: str = Q) -> list[float | bool | None]:
    return [value(raw, f"model.layers.{layer}.{part}", layers, parameter) for layer in range(layers)]


# -- layers -------------------------------------------------------------------------------------------------------------


@each("name, layer", [
    ("model.layers.3.self_attn.q_proj.weight", 3),
    ("model.layers.12.block_sparse_moe.experts.7.w1.weight", 12),
    ("transformer.h.0.attn.c_attn.weight", 0),
    ("h.11.mlp.c_fc.bias", 11),
    ("gpt_neox.layers.5.attention.dense.weight", 5),
    ("transformer.blocks.31.norm_1.weight", 31),
    ("bert.encoder.layer.4.output.dense.weight", 4),
    ("decoder.block.2.layer.1.DenseReluDense.wo.weight", 2),
    ("model.language_model.layers.9.mlp.gate_proj.weight", 9),
    ("model.embed_tokens.weight", None),
    ("lm_head.weight", None),
    ("model.norm.weight", None),
    ("model.mtp.0.weight", None),
    ("mlp.experts.3.w1.weight", None),
    ("adapters.2.layers.weight", None),
    ("layers.x.3.weight", None),
    ("layers", None),
    ("", None),
])  # fmt: skip
def test_the_layer_of_a_tensor(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_positions_run_from_the_first_layer_to_the_last() -> None:
    assert [position(f"h.{layer}.w", 5) for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert position("h.0.w", 1) == 1, "an only layer is the last"
    assert position(HEAD, 5) == position(HEAD, 1) == position(HEAD, 0) == 0
    assert position("h.7.w", 5) == 1, "beyond the last layer, as the layers of a model's further heads are"


# -- lists over layers --------------------------------------------------------------------------------------------------


def test_a_list_by_hand() -> None:
    """Truth values are not interpolated."""
    assert over_layers([0, 1], 5) == [0, 0.25, 0.5, 0.75, 1]
    assert over_layers([0, 0.5, 0.25], 5) == [0, 0.25, 0.5, 0.375, 0.25]
    assert over_layers([0, 1, 0, 1], 3) == [0, 0.5, 1]
    assert value([0.25, 1], HEAD, 5) == 0.25
    assert value([0.25, 1], "h.0.w", 1) == 1
    assert over_layers([True, False, True], 5, FLAG) == [True, True, False, False, True]
    assert over_layers([False, True], 4, FLAG) == [False, False, False, True]


@given(st.lists(numbers, min_size=1, max_size=9), st.integers(1, 40))
def test_lists_against_numpys_interpolation(values: list[float], layers: int) -> None:
    """A list of one value for every layer is these values; it ends on the last; outside of layers the first one holds."""
    found = over_layers(values, layers)
    if len(values) > 1 and layers > 1:
        expected = np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(values)), values)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert all(min(values) - 1e-9 <= one <= max(values) + 1e-9 for one in found if one is not None)
    assert found[-1] == values[-1]
    assert value(values, HEAD, layers) == values[0]
    exact = [values[layer % len(values)] for layer in range(max(layers, 2))]
    assert over_layers(exact, len(exact)) == pytest.approx(exact)


@given(st.lists(st.booleans(), min_size=2, max_size=9), st.sampled_from([2, 3, 5, 9, 17, 33]))
def test_truth_values_against_counting(values: list[bool], layers: int) -> None:
    """Value i begins at layer i (layers - 1) / (n - 1), exactly for these numbers of layers."""
    expected = [
        [flag for index, flag in enumerate(values) if index * (layers - 1) <= layer * (len(values) - 1)][-1]
        for layer in range(layers)
    ]
    assert over_layers(values, layers, FLAG) == expected


# -- filters ------------------------------------------------------------------------------------------------------------


def test_the_first_filter_that_holds_is_taken() -> None:
    raw = [
        {"filter": "self_attn", "value": [0, 0.5, 1]},
        {"filter": "mlp", "value": [1, 0]},
        {"filter": "q_proj", "value": 7},
        {"value": 0.5},
    ]
    assert over_layers(raw, 3) == [0, 0.5, 1]
    assert over_layers(raw, 3, part=UP) == [1, 0.5, 0]
    assert value(raw, HEAD, 3) == 0.5


def test_what_a_filter_matches() -> None:
    def holds(pattern: str | None, tensor: str) -> bool:
        return value([{"filter": pattern, "value": 1}], tensor, 4) == 1

    tensor = "model.layers.2.mlp.up_proj.weight"
    assert all(holds(pattern, tensor) for pattern in (None, "*", "mlp", "layers.2.", tensor, ".", ""))
    assert not any(holds(pattern, tensor) for pattern in ("MLP", "mlp*", "^model", "layers.3", "up_proj.*", " "))


def test_one_filter_may_stand_without_a_list() -> None:
    assert value({"filter": "mlp", "value": [0, 1]}, "h.1.mlp.w", 3) == 0.5
    assert value({"filter": "mlp", "value": 1}, HEAD, 3) is None
    assert value({"value": 1}, HEAD, 3) == 1


def test_where_no_filter_holds_the_next_setting_is_asked() -> None:
    own, _ = read_setting([{"filter": "mlp", "value": 0.25}], WEIGHT)
    common, _ = read_setting([{"filter": "self_attn", "value": 0.5}], WEIGHT)
    rest, _ = read_setting(0.75, WEIGHT)
    assert resolve([own, common, rest], "h.0.mlp.w", 0) == 0.25
    assert resolve([own, common, rest], "h.0.self_attn.w", 0) == 0.5
    assert resolve([own, common, rest], HEAD, 0) == 0.75
    assert resolve([rest, own], "h.0.mlp.w", 0) == 0.75
    assert resolve([own, common], HEAD, 0) is None
    assert resolve([], HEAD, 0) is None


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "ab", "ba", "*", None]), numbers), min_size=1, max_size=5))
def test_filters_against_a_plain_search(rules: list[tuple[str | None, float]]) -> None:
    raw = [{"filter": pattern, "value": number} for pattern, number in rules]
    for tensor in ("a", "b", "ab", "bba", "c"):
        fitting = [
            number for pattern, number in rules if pattern is None or pattern == "*" or tensor.find(pattern) >= 0
        ]
        assert value(raw, tensor, 3) == (fitting[0] if fitting else None)


# -- kinds --------------------------------------------------------------------------------------------------------------


@each("raw, parameter, expected", [
    (1, WEIGHT, 1.0), ("1e-3", WEIGHT, 0.001), (" 0.5 ", WEIGHT, 0.5), (-2.5, WEIGHT, -2.5), (0, DENSITY, 0.0),
    ("1", DENSITY, 1.0), (7, SEED, 7), ("7", SEED, 7), (2**60 + 1, SEED, 2**60 + 1), (True, FLAG, True),
    (0, FLAG, False), (1.0, FLAG, True), ("true", FLAG, True), ("Off", FLAG, False),
])  # fmt: skip
def test_a_value_is_of_its_parameters_kind(raw: Any, parameter: Parameter, expected: Any) -> None:
    found = value(raw, HEAD, 3, parameter)
    assert found == expected
    assert type(found) is parameter.kind


@each("raw, parameter, expected", [
    ("half", WEIGHT, [((), "should be a number, not 'half'")]),
    (True, WEIGHT, [((), "should be a number, not True")]),
    (None, WEIGHT, [((), "should be a number, not nothing")]),
    ([], WEIGHT, [((), "is an empty list")]),
    (float("nan"), WEIGHT, [((), "should be a number, not nan")]),
    ("inf", WEIGHT, [((), "should be a number, not 'inf'")]),
    (10**400, Parameter("t", low=0), [((), f"should be a number, not {10**400}")]),
    ([0.5, "x", [1]], WEIGHT, [(("1",), "should be a number, not 'x'"), (("2",), "should be a number, not list")]),
    ([0, 1.5], DENSITY, [(("1",), "should be between 0 and 1, not 1.5")]),
    (-1, Parameter("select_topk", low=0), [((), "should be at least 0, not -1")]),
    (2, Parameter("least", high=1), [((), "should be at most 1, not 2")]),
    (2, FLAG, [((), "should be true or false, not 2")]),
    ("maybe", FLAG, [((), "should be true or false, not 'maybe'")]),
    ([True, 0.5], FLAG, [(("1",), "should be true or false, not 0.5")]),
    (0.5, SEED, [((), "should be a whole number, not 0.5")]),
    (-1, SEED, [((), "should be at least 0, not -1")]),
    ([1, 2], SEED, [((), "is one whole number for all tensors, not list")]),
    ({"value": 1}, SEED, [((), "is one whole number for all tensors, not dict")]),
    ([{"filter": "mlp", "value": 1}, 0.5], WEIGHT,
     [(("1",), "in a list with filters, should be a mapping of value and filter, not 0.5")]),
    ([{"filter": "mlp"}], WEIGHT, [(("0", "value"), "is missing")]),
    ([{"filter": 3, "value": 1}], WEIGHT, [(("0", "filter"), "should be a part of a tensor's name, not 3")]),
    ([{"value": []}], WEIGHT, [(("0", "value"), "is an empty list")]),
    ([{"value": [{"value": 1}]}], WEIGHT, [(("0", "value", "0"), "should be a number, not dict")]),
    ({"value": 1, "fliter": "a"}, WEIGHT, [(("fliter",), "unknown key; did you mean filter?")]),
    ([{"value": 1, 3: 4}], WEIGHT, [(("0", "3"), "unknown key; known here: value, filter")]),
])  # fmt: skip
def test_what_is_wrong_with_a_setting(raw: Any, parameter: Parameter, expected: list[Any]) -> None:
    assert read_setting(raw, parameter)[1] == expected
