"""Reading a recipe: YAML with line numbers, every mistake found and reported together, each with its place and, for a
misspelt key, the right one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fusechat.data.data_files import suffix_of
from fusechat.errors import RecipeError
from fusechat.models.chat_model import is_template_file
from fusechat.recipe.schema import Recipe
from fusechat.recipe.yaml_file import Document, Loader, kind, parse, read_text, suggestion
from fusechat.run.files import write_text

MergeCheck = Callable[[str, dict[str, Any], list[str]], list[Any]]  # method, parameters, targets → what is wrong


def read_recipe(
    path: Path, overrides: list[str] | None = None, *, dtype: str | None = None, merge_check: MergeCheck | None = None
) -> Recipe:
    """The recipe in `path`, with `KEY=VALUE` overrides, paths made absolute. `dtype`: what `auto` stands for, None for what suits
    this machine. `merge_check`: the merging stage's own check of its parameters. Raises RecipeError with all that is wrong."""
    document = _parse(path)
    for override in overrides or []:
        _set(document.content, override)
    try:
        content = _absolute_paths(document.content, path.resolve().parent)
        recipe = Recipe.model_validate(content, context={"dtype": dtype, "merge_check": merge_check})
    except ValidationError as error:
        _explain(error, document)
    if document.wrong:
        raise RecipeError(*document.wrong)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """The recipe as resolved, defaults filled in; `read_recipe` reads it back the same."""
    write_text(path, _text(recipe))


def is_saved(recipe: Recipe, path: Path) -> bool:
    """Whether this very recipe was saved there."""
    return path.is_file() and path.read_text(encoding="utf-8") == _text(recipe)


def _text(recipe: Recipe) -> str:
    content = recipe.model_dump(exclude_none=True, by_alias=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def recipe_identity(path: Path) -> tuple[str, tuple[str, ...]]:
    """Name and pivot of a saved recipe, without asking whether its models and data are still there."""
    raw = _parse(path).content
    pivot = raw.get("pivot")
    pivot = pivot if isinstance(pivot, dict) else {"model": str(pivot)}
    wheels = (f"wheel:{part.removeprefix('wheel:')}" for part in pivot.get("wheel", []))
    return str(raw.get("name")), (pivot["model"],) if pivot.get("model") else tuple(wheels)


def raw_recipe(path: Path) -> dict[str, Any]:
    """A saved recipe as it is written, without asking whether its models and data are still there."""
    return _parse(path).content


def _parse(path: Path) -> Document:
    return parse(read_text(path), path, what="a recipe")


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--set {override}: not of the form KEY=VALUE, such as fuse.sft_weight=0.5")
    *above, last = key.split(".")
    section: Any = raw
    for name in above:
        at = _entry(section, name, override)
        inner = section[at] if isinstance(section, list) else section.get(at)
        if isinstance(inner, str):  # a bare model reference stands for {model: reference}, a bare path for {path: …}
            inner = {"path" if name in ("train", "validation") or isinstance(section, list) else "model": inner}
        section[at] = list(inner) if isinstance(inner, list) else dict(inner) if isinstance(inner, dict) else {}
        section = section[at]
    try:
        section[_entry(section, last, override)] = yaml.load(value, Loader=Loader)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not YAML") from None


def _entry(section: Any, name: str, override: str) -> Any:
    """The key of a mapping, the index of a list, from 0 on."""
    if not isinstance(section, list):
        return name
    if not name.isdecimal() or int(name) >= len(section):
        raise RecipeError(f"--set {override}: {name} is no index of a list of {len(section)}")
    return int(name)


def _explain(error: ValidationError, document: Document) -> None:
    for item in error.errors():
        place = tuple(str(part) for part in item["loc"] if not str(part).startswith("["))  # "[key]", "[several]"
        what = item["msg"]
        if item["type"] == "value_error":  # one of our own checks: several things, some with their place in the section
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
    """The key that was meant, among those of the section that `place` is in."""
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
    """Those that a value of this annotation may be, or hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


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
    return recipe


def _absolute(text: str, base: Path) -> str:
    """A path from `base` where there is such a file or where it can be nothing else; a hub id or wheel as it is."""
    if text.startswith("wheel:"):
        return text
    path = Path(text).expanduser()
    local = path if path.is_absolute() else base / path
    looks_local = text.startswith((".", "~", "/")) or path.suffix == ".gguf" or suffix_of(path)
    return str(local.resolve()) if looks_local or local.exists() else text
