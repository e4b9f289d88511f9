"""YAML that a user writes: plain values, the line of every key, and messages with places."""

import datetime
import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fusechat.errors import RecipeError


class Loader(yaml.SafeLoader):
    """YAML that reads `5e-6` as a number."""


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back: the text `5e-6` in quotes."""


for _one in (Loader, Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )

Place = tuple[str, ...]  # the keys and list indices that lead to a value


@dataclass
class Document:
    """A mapping from the file `name`, or from elsewhere without lines. `wrong`: a message for each mistake. `reused`: top-level
    keys whose values, in part, are also used elsewhere by an alias."""

    name: str
    content: dict[str, Any]
    lines: dict[Place, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    reused: set[str] = field(default_factory=set)

    def at(self, place: Place, what: str) -> str:
        """`name:line: key: what`, with the line of the innermost part of `place` in the file."""
        line = next((self.lines[place[:cut]] for cut in range(len(place), 0, -1) if place[:cut] in self.lines), None)
        key = ".".join(place)
        return f"{self.name}{f':{line}' if line else ''}: {f'{key}: ' if key else ''}{what}"

    def complain(self, place: Place, what: str) -> None:
        """Records a mistake at a place."""
        self.wrong.append(self.at(place, what))


def read_text(path: Path) -> str:
    """The text of a file. Raises RecipeError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None


def parse(text: str, path: Path, *, what: str) -> Document:
    """Parses the mapping in `text` and records duplicate keys. Raises RecipeError, about `what`, if it is not a mapping."""
    document = Document(str(path), {})
    try:
        node = yaml.compose(text, Loader=Loader)
        if node is not None:
            _walk(node, (), document)
            document.reused = _reused(node)
        content = yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem or error.context}"
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nests too deep, or in itself") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: {what} is a mapping of keys, not {kind(content)}")
    document.content = content
    return document


def of_mapping(content: Mapping[str, Any], name: str) -> Document:
    """Copies a program's mapping as a file would have it: tuples become lists, paths text, NumPy values Python's. Raises
    RecipeError for values that no file can have."""
    document = Document(name, {})
    try:
        document.content = _plain(content, (), document)
    except RecursionError:
        raise RecipeError(f"{name}: nests too deep, or in itself") from None
    if document.wrong:
        raise RecipeError(*document.wrong)
    return document


def _plain(value: Any, place: Place, document: Document) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, (*place, str(key)), document) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, (*place, str(number)), document) for number, inner in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy, pandas, PyTorch
        return _plain(value.tolist(), place, document)
    if isinstance(value, str):
        return str.__str__(value)  # the text of an enumeration
    for simple in (bool, int, float):
        if isinstance(value, simple):
            return simple(value)
    if value is not None and not isinstance(value, datetime.date):
        document.complain(place, f"should be text, a number, a list or a mapping of keys, not {kind(value)}")
    return value


def second_document(text: str) -> int | None:
    """The line of a second document in the text; None without one, or if `parse` fails."""
    try:
        nodes = list(yaml.compose_all(text, Loader=Loader))
    except (yaml.YAMLError, RecursionError):
        return None
    return nodes[1].start_mark.line + 1 if len(nodes) > 1 else None


def _walk(node: yaml.Node, at: Place, document: Document) -> None:
    document.lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value)
            place = (*at, name)
            document.lines[place] = key.start_mark.line + 1
            if name in seen:
                document.complain(place, "stands here twice")
            seen.add(name)
            _walk(value, place, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*at, str(index)), document)


def _reused(node: yaml.Node) -> set[str]:
    if not isinstance(node, yaml.MappingNode):
        return set()
    parts = [(str(key.value), _nodes(value)) for key, value in node.value]
    count = Counter(part for _, within in parts for part in within)
    return {name for name, within in parts if any(count[part] > 1 for part in within)}


def _nodes(node: yaml.Node) -> set[int]:
    """The identities of a node and all nodes within it; an alias is its anchor's node."""
    inner = node.value if isinstance(node, yaml.SequenceNode) else ()
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return {id(node)}.union(*map(_nodes, inner), *(_nodes(part) for pair in pairs for part in pair))


def kind(value: Any) -> str:
    """The name of a value's type, for messages."""
    return "nothing" if value is None else type(value).__name__


def suggestion(word: str, known: Iterable[str]) -> str:
    """The text after "unknown key": the likely key, else all keys."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(names)}" if names else ""
