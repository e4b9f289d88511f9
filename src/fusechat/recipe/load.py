"""Reads a recipe from YAML with line numbers. Reports all mistakes together, with their places and suggestions."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fusechat.data.data_files import suffix_of
from fusechat.errors import RecipeError
from fusechat.models.chat_model import is_template_file
from fusechat.recipe.schema import Recipe
from fusechat.recipe.yaml_file import Document, Dumper, Loader, Place, kind, of_mapping, parse, read_text, suggestion
from fusechat.run.files import write_text

MergeCheck = Callable[[str, dict[str, Any], list[str]], list[Any]]  # (method, parameters, targets) → mistakes


def read_recipe(
    source: Path | Mapping[str, Any],
    overrides: list[str] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    merge_check: MergeCheck | None = None,
) -> Recipe:
    """Reads a recipe from a file or mapping, with `KEY=VALUE` overrides and absolute paths. Raises RecipeError.

    `changes`: parts of sections that replace the recipe's keys. Relative paths start at the file's directory, those of a mapping
    and of `changes` at the working directory. `dtype`: the meaning of `auto`, None for this machine's. `merge_check`: the merge
    stage's check of its parameters.
    """
    document = of_mapping(source, "recipe") if isinstance(source, Mapping) else _parse(source)
    base = Path.cwd() if isinstance(source, Mapping) else source.resolve().parent
    for override in overrides or []:
        _override(document.content, override)
    for place, value in _leaves(_absolute_paths(of_mapping(changes or {}, "recipe").content, Path.cwd())):
        _set(document.content, place, value, f"{document.name}: {'.'.join(place)}")
    try:
        content = _absolute_paths(document.content, base)
        recipe = Recipe.model_validate(content, context={"dtype": dtype, "merge_check": merge_check})
    except ValidationError as error:
        _explain(error, document)
    if document.wrong:
        raise RecipeError(*document.wrong)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe with all defaults; `read_recipe` reads the same one back."""
    write_text(path, _text(recipe))


def is_saved(recipe: Recipe, path: Path) -> bool:
    """Whether `path` has this very recipe."""
    return path.is_file() and path.read_text(encoding="utf-8") == _text(recipe)


def _text(recipe: Recipe) -> str:
    content = recipe.model_dump(exclude_none=True, by_alias=True)
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def recipe_identity(path: Path) -> tuple[str, tuple[str, ...]]:
    """Name and pivot of a saved recipe, without checking its models and data."""
    raw = _parse(path).content
    pivot = raw.get("pivot")
    pivot = pivot if isinstance(pivot, dict) else {"model": str(pivot)}
    wheels = (f"wheel:{part.removeprefix('wheel:')}" for part in pivot.get("wheel", []))
    return str(raw.get("name")), (pivot["model"],) if pivot.get("model") else tuple(wheels)


def raw_recipe(path: Path) -> dict[str, Any]:
    """A saved recipe as written, without checking its models and data."""
    return _parse(path).content


def _parse(path: Path) -> Document:
    return parse(read_text(path), path, what="a recipe")


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    said = f"--set {override}"
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{said}: not of the form KEY=VALUE, such as fuse.sft_weight=0.5")
    try:
        _set(raw, tuple(key.split(".")), yaml.load(value, Loader=Loader), said)
    except yaml.YAMLError:
        raise RecipeError(f"{said}: the value is not YAML") from None


def _leaves(changes: dict[str, Any], above: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Each change with its place: descends into mappings; everything else is a value."""
    for key, value in changes.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _set(raw: dict[str, Any], place: Place, value: Any, said: str) -> None:
    """`said`: the user's name for the change."""
    *above, last = place
    section: Any = raw
    for name in above:
        at = _entry(section, name, said)
        inner = section[at] if isinstance(section, list) else section.get(at)
        if isinstance(inner, str):  # a bare reference means {model: reference}, a bare path {path: …}
            inner = {"path" if name in ("train", "validation") or isinstance(section, list) else "model": inner}
        section[at] = list(inner) if isinstance(inner, list) else dict(inner) if isinstance(inner, dict) else {}
        section = section[at]
    section[_entry(section, last, said)] = value


def _entry(section: Any, name: str, said: str) -> Any:
    """A key of a mapping, or an index of a list."""
    if not isinstance(section, list):
        return name
    if not name.isdecimal() or int(name) >= len(section):
        raise RecipeError(f"{said}: {name} is no index of a list of {len(section)}")
    return int(name)


def _explain(error: ValidationError, document: Document) -> None:
    for item in error.errors():
        place = tuple(str(part) for part in item["loc"] if not str(part).startswith("["))  # "[key]", "[several]"
        what = item["msg"]
        if item["type"] == "value_error":  # FuseChat's own checks: several mistakes, some with a place
            for found in item["ctx"]["error"].args:
                inner, what = found if isinstance(found, tuple) else ((), str(found))
                document.complain((*place, *inner), what)
            continue
        if item["type"] == "extra_forbidden":
            what = "unknown key" + _suggestion(place)
        elif item["type"] == "missing":
            what = "is missing"
        elif item["type"] in ("model_type", "dict_type"):
            what = f"should be a mapping of keys, not {kind(item['input'])}"
        elif item["type"] == "string_pattern_mismatch" and place[-1] != "sha256":
            what = "a name holds letters, digits, '.', '_' and '-' only"
        elif isinstance(item["input"], str | int | float | bool):
            what += f", not {item['input']!r}"
        document.complain(place, what)


def _suggestion(place: tuple[str, ...]) -> str:
    """The likely key, among those of the section of `place`."""
    section: type[BaseModel] | None = Recipe
    above = [key for key in place[:-1] if not key.isdecimal()]  # without indices of lists
    while above and section is not None:
        field = section.model_fields.get(above.pop(0))
        annotation = field.annotation if field is not None else None
        if get_origin(annotation) is dict and above:
            above.pop(0)  # the name of a source
        section = next(_sections(annotation), None)
    if section is None:
        return ""
    return suggestion(place[-1], [field.alias or name for name, field in section.model_fields.items()])


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value of this annotation may be or contain."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _absolute_paths(recipe: dict[str, Any], base: Path) -> dict[str, Any]:
    """Makes paths of data files and local models in a raw recipe absolute, and reads template files. Ignores other forms."""

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
            if key in section:
                entry = section[key]
                section[key] = [path(one) for one in entry] if isinstance(entry, list) else path(entry)
        return section

    def path(entry: Any) -> Any:
        if isinstance(entry, str):
            return _absolute(entry, base)
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            return {**entry, "path": _absolute(entry["path"], base)}
        return entry

    recipe = dict(recipe)
    if "pivot" in recipe:
        recipe["pivot"] = model(recipe["pivot"])
    if isinstance(recipe.get("sources"), dict):
        recipe["sources"] = {name: model(spec) for name, spec in recipe["sources"].items()}
    if "data" in recipe:
        recipe["data"] = data(recipe["data"])
    choose = recipe["generate"].get("choose") if isinstance(recipe.get("generate"), dict) else None
    if isinstance(choose, dict):
        choose = {key: model(value) if key == "reward" else value for key, value in choose.items()}
        recipe["generate"] = {**recipe["generate"], "choose": choose | _verifier(choose.get("verifier"), base)}
    return recipe


def _verifier(said: Any, base: Path) -> dict[str, Any]:
    """A verifier whose command, or a word of it, is a file next to the recipe, as words with absolute paths."""
    try:
        words = said if isinstance(said, list) else shlex.split(said) if isinstance(said, str) else []
    except ValueError:  # reported by the section
        return {}
    found = [
        str((base / word).resolve()) if isinstance(word, str) and (base / word).is_file() else word for word in words
    ]
    return {} if found == words else {"verifier": found}


def _absolute(text: str, base: Path) -> str:
    """A path from `base` if the file exists or the text can only be a path; hub ids and wheels unchanged."""
    if text.startswith("wheel:"):
        return text
    path = Path(text).expanduser()
    local = path if path.is_absolute() else base / path
    looks_local = text.startswith((".", "~", "/")) or path.suffix == ".gguf" or suffix_of(path)
    return str(local.resolve()) if looks_local or local.exists() else text
