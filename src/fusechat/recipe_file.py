"""Reading a recipe: YAML with line numbers, every mistake found and reported together, each with its place and, for a
misspelt key, the right one."""

import difflib
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fusechat.config import Recipe, is_template_file
from fusechat.core.files import write_text
from fusechat.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """YAML in which `5e-6` is the number that its writer means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

Lines = dict[tuple[str, ...], int]


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in `path`, with `KEY=VALUE` overrides, paths made absolute. Raises RecipeError with all that is wrong."""
    raw, lines, repeated = _parse(_read(path), path)
    for override in overrides or []:
        _set(raw, override)
    try:
        recipe = Recipe.model_validate(_absolute_paths(raw, path.resolve().parent))
    except ValidationError as error:
        raise RecipeError(*repeated, *_explain(error, path, lines)) from None
    if repeated:
        raise RecipeError(*repeated)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """The recipe as resolved, defaults filled in; `load_recipe` reads it back the same."""
    write_text(
        path, yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True, width=120)
    )


def recipe_identity(path: Path) -> tuple[str, tuple[str, ...]]:
    """Name and pivot of a saved recipe, without asking whether its models and data are still there."""
    raw, _, _ = _parse(_read(path), path)
    pivot = raw.get("pivot")
    pivot = pivot if isinstance(pivot, dict) else {"model": str(pivot)}
    wheels = (f"wheel:{part.removeprefix('wheel:')}" for part in pivot.get("wheel", []))
    return str(raw.get("name")), (pivot["model"],) if pivot.get("model") else tuple(wheels)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None


def _parse(text: str, path: Path) -> tuple[dict[str, Any], Lines, list[str]]:
    """The mapping, the line of every key, and a message for every key that stands twice."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        lines: Lines = {}
        repeated: list[str] = []
        if node is not None:
            _walk(node, (), lines, repeated)
        raw = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem or error.context}"
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nests too deep, or in itself") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, not {_kind(raw)}")
    return raw, lines, [f"{path}:{place}" for place in repeated]


def _walk(node: yaml.Node, at: tuple[str, ...], lines: Lines, repeated: list[str]) -> None:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value)
            place = (*at, name)
            if name in seen:
                repeated.append(f"{key.start_mark.line + 1}: {'.'.join(place)}: stands here twice")
            seen.add(name)
            lines[place] = key.start_mark.line + 1
            _walk(value, place, lines, repeated)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*at, str(index)), lines, repeated)


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--set {override}: not of the form KEY=VALUE, such as fuse.sft_weight=0.5")
    *above, last = key.split(".")
    section = raw
    for name in above:
        inner = section.get(name)
        if isinstance(inner, str):  # a bare model reference stands for {model: reference}, a bare path for {path: …}
            inner = {"path" if name in ("train", "validation") else "model": inner}
        section[name] = dict(inner) if isinstance(inner, dict) else {}
        section = section[name]
    try:
        section[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not YAML") from None


def _explain(error: ValidationError, path: Path, lines: Lines) -> list[str]:
    messages = []
    for item in error.errors():
        place = tuple(str(part) for part in item["loc"] if part != "[key]")
        line = next((lines[place[:cut]] for cut in range(len(place), 0, -1) if place[:cut] in lines), None)
        key = ".".join(place)
        what = item["msg"]
        if item["type"] == "value_error":  # one of our own checks, which may have found several things
            messages += [_at(path, line, key, str(what)) for what in item["ctx"]["error"].args]
            continue
        if item["type"] == "extra_forbidden":
            what = "unknown key" + _suggestion(place)
        elif item["type"] == "missing":
            what = "is missing"
        elif item["type"] in ("model_type", "dict_type"):
            what = f"should be a mapping of keys, not {_kind(item['input'])}"
        elif item["type"] == "string_pattern_mismatch" and place[-1] != "sha256":
            what = "a name holds letters, digits, '.', '_' and '-' only"
        elif isinstance(item["input"], str | int | float | bool):
            what += f", not {item['input']!r}"
        messages.append(_at(path, line, key, what))
    return messages


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _at(path: Path, line: int | None, key: str, what: str) -> str:
    return f"{path}{f':{line}' if line else ''}: {f'{key}: ' if key else ''}{what}"


def _suggestion(place: tuple[str, ...]) -> str:
    """The key that was meant, among those of the section that `place` is in."""
    section: type[BaseModel] | None = Recipe
    above = list(place[:-1])
    while above and section is not None:
        field = section.model_fields.get(above.pop(0))
        kind = field.annotation if field is not None else None
        if get_origin(kind) is dict and above:
            above.pop(0)  # the name of a source
        section = next((kind for kind in (kind, *get_args(kind)) if _is_section(kind)), None)
    if section is None:
        return ""
    close = difflib.get_close_matches(place[-1], list(section.model_fields), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(section.model_fields)}"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _absolute_paths(recipe: dict[str, Any], base: Path) -> dict[str, Any]:
    """Makes data files and local models of a raw recipe absolute, and reads template files. Leaves alone what is of another
    form."""

    def model(spec: Any) -> Any:
        if isinstance(spec, str):
            return _absolute(spec, base)
        if not isinstance(spec, dict):
            return spec
        spec = dict(spec)
        if isinstance(spec.get("model"), str):
            spec["model"] = _absolute(spec["model"], base)
        template = spec.get("chat_template")
        if isinstance(template, str) and is_template_file(template) and (base / template).is_file():
            spec["chat_template"] = (base / template).read_text(encoding="utf-8")
        if "data" in spec:
            spec["data"] = data(spec["data"])
        return spec

    def data(section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        section = dict(section)
        for key in ("train", "validation"):
            entry = section.get(key)
            if isinstance(entry, str):
                section[key] = _absolute(entry, base)
            elif isinstance(entry, dict) and isinstance(entry.get("path"), str):
                section[key] = {**entry, "path": _absolute(entry["path"], base)}
        return section

    recipe = dict(recipe)
    if "pivot" in recipe:
        recipe["pivot"] = model(recipe["pivot"])
    if isinstance(recipe.get("sources"), dict):
        recipe["sources"] = {name: model(spec) for name, spec in recipe["sources"].items()}
    if "data" in recipe:
        recipe["data"] = data(recipe["data"])
    return recipe


def _absolute(text: str, base: Path) -> str:
    """A path from `base` where there is such a file or where it can be nothing else; a hub id or wheel as it is."""
    if text.startswith("wheel:"):
        return text
    path = Path(text).expanduser()
    local = path if path.is_absolute() else base / path
    looks_local = text.startswith((".", "~", "/")) or path.suffix in (".jsonl", ".json", ".parquet", ".gguf")
    return str(local.resolve()) if looks_local or local.exists() else text
