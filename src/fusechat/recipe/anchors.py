"""The entries of docs/recipe.md for recipe keys that a message names."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import get_args

PAGE = "docs/recipe.md"
_PLACE = re.compile(r"(?:\.ya?ml|:\d+): (?P<key>[a-z_]+(?:\.[^\s:]+)*): ")  # as `yaml_file.Document` writes it
_DOTTED = re.compile(
    r"(?<![\w./-])(?:data|generate|capture|align|fuse|rounds|merge|evaluate|pivot|sources)(?:\.[\w-]+)+"
)
_FILE = re.compile(r"\.(jsonl?|parquet|gz|ya?ml|gguf|txt|md|py)$")


def links(messages: Iterable[str]) -> list[str]:
    """`docs/recipe.md#KEY` for the keys in messages, in order, each once."""
    found = dict.fromkeys(anchor(key) for message in messages for key in _keys(message))
    return [f"{PAGE}#{one}" for one in found if one]


def anchor(key: str) -> str | None:
    """The anchor of a key's longest prefix that has an entry: `fuse` for `fuse.sft_wieght`; None if there is none."""
    models, sets, known = _known()
    key = re.sub(r"\.\d+(?=\.|$)", "", key)  # indices of lists
    key = re.sub(rf"^sources\..+?\.(?=({models})(\.|$))", "pivot.", key)
    key = re.sub(r"^sources\..+?\.(?=(data|capture|stop|server)(\.|$))", "sources.NAME.", key)
    key = re.sub(rf"^(sources\.NAME\.)?data\.(train|validation)\.(?=({sets})$)", "data.train.", key)
    parts = key.split(".")
    return next((start for end in range(len(parts), 0, -1) if (start := ".".join(parts[:end])) in known), None)


def anchors() -> frozenset[str]:
    """Every anchor that a link may have."""
    return _known()[2]


def _keys(message: str) -> Iterator[str]:
    """The key that the message is about, known or not, then known dotted keys in its text."""
    place = _PLACE.search(message)
    if place:
        yield place["key"]
    dotted = (key for key in _DOTTED.findall(message) if not _FILE.search(key))
    yield from (key for key in dotted if "." in (anchor(key) or ""))


@cache
def _known() -> tuple[str, str, frozenset[str]]:
    """From the schema: keys of a model and of a data set, as alternatives of a regular expression, and all anchors."""
    from fusechat.recipe.schema import Recipe
    from fusechat.recipe.sections import ModelSpec, TrainingSet

    found = {*Recipe.model_fields, *(f"sources.NAME.{key}" for key in ("data", "capture", "stop", "server"))}
    for name, field in Recipe.model_fields.items():
        for section in (field.annotation, *get_args(field.annotation)) if name != "sources" else ():  # `Section | None`
            for key, inner in getattr(section, "model_fields", {}).items():
                found.add(f"{name}.{inner.alias or key}")
    found |= {f"data.train.{key}" for key in TrainingSet.model_fields}
    return "|".join(ModelSpec.model_fields), "|".join(TrainingSet.model_fields), frozenset(found)
