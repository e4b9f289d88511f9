"""The `merge` section of a recipe: the settings of a merge file, for targets that do not exist yet."""

from pathlib import Path
from typing import Any

from fusechat.merge.methods import load_method, method_names
from fusechat.merge.parameters import SEED, Parameter
from fusechat.merge.values import Wrong, read_setting
from fusechat.recipe.yaml_file import suggestion

DEFAULTS = {"linear": {"weight": 1.0}}  # the targets' mean


def problems(method: str, given: dict[str, Any], targets: list[str]) -> list[Wrong]:
    """The mistakes in a recipe's merge section; `given` has the keys that are set."""
    names = method_names()
    if method not in names:
        meant = suggestion(method, names).partition("; known")[0]
        return [(("method",), f"no such method as {method!r}{meant}; there are {', '.join(names)}")]
    module = load_method(method)
    readable = {parameter.name: parameter for parameter in module.PARAMETERS if parameter is not SEED}
    granular = getattr(module, "GRANULARITIES", ())
    wrong: list[Wrong] = [
        ((name,), f"is not read by {method}")
        for name in given
        if name not in readable and not (name == "granularity" and granular)
    ]
    if module.TARGETS not in (None, len(targets)):
        wrong.append(
            (("method",), f"{method} takes {module.TARGETS} target, and the recipe has {len(targets)} sources")
        )
    for name, parameter in readable.items():
        if name in given:
            wrong += [((name, *place), what) for place, what in _of(given[name], parameter, targets)]
        elif parameter.required and name not in DEFAULTS.get(method, {}):
            wrong.append(((name,), f"is missing: {method} has no default for it"))
    if (
        method == "linear"
        and not wrong
        and given.get("normalize", True)
        and _add_up_to_zero(given.get("weight"), targets)
    ):
        wrong.append((("weight",), "add up to zero, and normalize divides by their sum"))
    return wrong


def _add_up_to_zero(raw: Any, targets: list[str]) -> bool:
    """Whether plain numbers add up to zero; lists and filters are checked once the tensors are known."""
    every = [raw.get(target) for target in targets] if isinstance(raw, dict) and "value" not in raw else [raw]
    numbers = [float(value) for value in every if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(every) and abs(sum(numbers)) < 1e-8


def _of(raw: Any, parameter: Parameter, targets: list[str]) -> list[Wrong]:
    if not _by_target(raw, parameter):
        return read_setting(raw, parameter)[1]
    wrong: list[Wrong] = [
        ((str(key),), f"no such source; there are {', '.join(targets)}") for key in raw if key not in targets
    ]
    if parameter.required:
        wrong += [((), f"names no value for {target}") for target in targets if target not in raw]
    for key, value in raw.items():
        wrong += [((str(key), *place), what) for place, what in read_setting(value, parameter)[1]]
    return wrong


def _by_target(raw: Any, parameter: Parameter) -> bool:
    return parameter.per_model and isinstance(raw, dict) and "value" not in raw


def configuration(
    method: str, given: dict[str, Any], *, pivot: Path, targets: dict[str, Path], seed: int
) -> dict[str, Any]:
    """The recipe's settings and its finished models, as `read_merge_file` reads them."""
    module = load_method(method)
    shared = {**DEFAULTS.get(method, {}), **given}
    own: dict[str, dict[str, Any]] = {name: {} for name in targets}
    for parameter in module.PARAMETERS:
        if _by_target(shared.get(parameter.name), parameter):
            for name, value in shared.pop(parameter.name).items():
                own[name][parameter.name] = value
    if SEED in module.PARAMETERS:
        shared["seed"] = seed
    return {
        "merge_method": method,
        **({"base_model": str(pivot)} if module.BASE else {}),
        "models": [{"model": str(path), "parameters": own[name]} for name, path in targets.items()],
        "parameters": shared,
    }
