"""A parameter's value for one tensor, resolved from the settings of a merge file as mergekit does.

A setting is a value, a list of values spread evenly over the layers, or a list of these with filters on the tensor's name.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fusechat.merge.parameters import Parameter
from fusechat.recipe.yaml_file import Place, kind, suggestion

_LAYERS = {"layers", "layer", "h", "blocks", "block"}  # names of lists of layers
_TRUTH = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
Wrong = tuple[Place, str]  # (where in a setting, what is wrong)


@dataclass(frozen=True)
class Rule:
    """One or more `values` over the layers, for tensors with `filter` in their names; None or "*" for all."""

    values: tuple[float | bool, ...]
    filter: str | None = None

    def holds(self, tensor_name: str) -> bool:
        """Whether the rule applies to a tensor."""
        return self.filter in (None, "*") or str(self.filter) in tensor_name


Setting = tuple[Rule, ...]  # the first that holds counts


def stack_of(tensor_name: str) -> tuple[str, int] | None:
    """The stack of layers of a tensor, and its layer there: `model.layers` and 3 for `model.layers.3.mlp.experts.7.w1.weight`."""
    parts = tensor_name.split(".")
    for place, (above, number) in enumerate(itertools.pairwise(parts), 1):
        if above in _LAYERS and number.isdecimal():
            return ".".join(parts[:place]), int(number)
    return None


def stacks_of(tensor_names: Iterable[str]) -> dict[str, int]:
    """The number of layers of each stack, by the names of the tensors."""
    found: dict[str, int] = {}
    for stack, layer in filter(None, map(stack_of, tensor_names)):
        found[stack] = max(found.get(stack, 0), layer + 1)
    return found


def layer_of(tensor_name: str) -> int | None:
    """The layer of a tensor, or None."""
    found = stack_of(tensor_name)
    return None if found is None else found[1]


def position(tensor_name: str, layer_count: int) -> float:
    """Where a tensor is between the first layer (0) and the last (1). A single layer is at 1, a tensor outside the layers at 0."""
    layer = layer_of(tensor_name)
    if layer is None:
        return 0.0
    return min(layer / (layer_count - 1), 1.0) if layer_count > 1 else 1.0


def resolve(settings: Iterable[Setting], tensor_name: str, at: float) -> float | bool | None:
    """The value for a tensor at `position` `at`, from the first setting that applies; None without one."""
    for setting in settings:
        for rule in setting:
            if rule.holds(tensor_name):
                return _along(rule.values, at)
    return None


def _along(values: tuple[float | bool, ...], at: float) -> float | bool:
    """Interpolates numbers linearly; bools are those of the step that `at` is in."""
    steps = at * (len(values) - 1)
    low = int(steps)
    if len(values) == 1 or isinstance(values[low], bool):
        return values[low]
    high = min(low + 1, len(values) - 1)
    return (1 - (steps - low)) * values[low] + (steps - low) * values[high]


def read_setting(raw: Any, parameter: Parameter) -> tuple[Setting, list[Wrong]]:
    """Parses a setting. Returns its mistakes too; it can be resolved if there are none."""
    wrong: list[Wrong] = []
    if parameter.kind is int and isinstance(raw, list | dict):
        return (), [((), f"is one whole number for all tensors, not {kind(raw)}")]
    if isinstance(raw, dict):
        return (_rule(raw, parameter, (), wrong),), wrong
    if not isinstance(raw, list) or not any(isinstance(item, dict) for item in raw):
        return (Rule(_values(raw, parameter, (), wrong)),), wrong
    rules = []
    for index, item in enumerate(raw):
        place = (str(index),)
        if isinstance(item, dict):
            rules.append(_rule(item, parameter, place, wrong))
        else:
            wrong.append((place, f"in a list with filters, should be a mapping of value and filter, not {shown(item)}"))
    return tuple(rules), wrong


def _rule(raw: dict[Any, Any], parameter: Parameter, place: Place, wrong: list[Wrong]) -> Rule:
    for key in raw:
        if key not in ("value", "filter"):
            wrong.append(((*place, str(key)), "unknown key" + suggestion(str(key), ("value", "filter"))))
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        wrong.append(((*place, "filter"), f"should be a part of a tensor's name, not {shown(pattern)}"))
    if "value" not in raw:
        wrong.append(((*place, "value"), "is missing"))
        return Rule(())
    return Rule(_values(raw["value"], parameter, (*place, "value"), wrong), pattern)


def _values(raw: Any, parameter: Parameter, place: Place, wrong: list[Wrong]) -> tuple[float | bool, ...]:
    values = []
    items = (
        [((*place, str(index)), item) for index, item in enumerate(raw)] if isinstance(raw, list) else [(place, raw)]
    )
    if not items:
        wrong.append((place, "is an empty list"))
    for where, item in items:
        try:
            values.append(_scalar(item, parameter))
        except ValueError as error:
            wrong.append((where, str(error)))
    return tuple(values)


def _scalar(raw: Any, parameter: Parameter) -> float | bool:
    """Parses a number or bool. Text may stand for either, since many YAML readers read `1e-3` as text. Raises ValueError."""
    if parameter.kind is bool:
        truth = _TRUTH.get(raw.strip().lower()) if isinstance(raw, str) else bool(raw) if raw in (0, 1) else None
        if truth is None:
            raise ValueError(f"should be true or false, not {shown(raw)}")
        return truth
    wanted = "whole number" if parameter.kind is int else "number"
    try:
        number = math.nan if isinstance(raw, bool) else parameter.kind(raw)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    cut = parameter.kind is int and isinstance(raw, float) and number != raw
    if cut or (isinstance(number, float) and not math.isfinite(number)):
        raise ValueError(f"should be a {wanted}, not {shown(raw)}")
    low, high = parameter.low, parameter.high
    if (low is not None and number < low) or (high is not None and number > high):
        limits = (
            f"at least {low}" if high is None else f"at most {high}" if low is None else f"between {low} and {high}"
        )
        raise ValueError(f"should be {limits}, not {shown(raw)}")
    return number


def shown(raw: Any) -> str:
    """An invalid value, for a message."""
    return repr(raw) if isinstance(raw, str | int | float | bool) else kind(raw)
