"""Facts about a model from local files. Fetches nothing, reads no weights."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusechat.models.companion_files import read_json_of
from fusechat.models.gguf import ABOUT

_HEADER_LIMIT = 1 << 30  # bytes; safetensors headers are never longer


@dataclass(frozen=True)
class Facts:
    """`parameters`: tied weights once. `bytes`: all files of the directory; `gguf_bytes`: the file that it was converted from.
    `licence`: as stated, or None."""

    architecture: str | None = None
    layers: int | None = None
    parameters: int | None = None
    dtypes: str = ""
    bytes: int | None = None
    vocabulary: int | None = None
    licence: str | None = None
    licence_from: str = ""
    gguf_bytes: int | None = None


@dataclass(frozen=True)
class Model:
    """A row of the table of models. `label`: its name elsewhere, or how it was made. `parts`: its reference, or its files with
    hashes. `identity`: kind and hash, as `sha256:…`. `data`: its training files."""

    role: str
    name: str
    label: str
    parts: tuple[str, ...]
    identity: str
    data: str
    facts: Facts


@dataclass(frozen=True)
class DataFile:
    """A data file. `counts`: of the pivot's prepare step; `is_made`: by the run itself."""

    name: str
    file: str
    identity: str
    use: str
    counts: Mapping[str, Any]
    is_made: bool = False


def facts(directory: Path | None) -> Facts:
    """The facts of a model directory. Unreadable ones are left out."""
    if directory is None:
        return Facts()
    config = read_json_of(directory / "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    parameters, dtypes = count_parameters(directory, tied=bool(config.get("tie_word_embeddings", False)))
    original = read_json_of(directory / ABOUT)
    licence, where = _licence(directory, original)
    architectures = config.get("architectures") or [None]
    return Facts(
        architecture=str(architectures[0]) if architectures[0] else None,
        layers=_number(text, "num_hidden_layers"),
        parameters=parameters,
        dtypes=dtypes,
        bytes=sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        vocabulary=_number(text, "vocab_size"),
        licence=licence,
        licence_from=where,
        gguf_bytes=_number(original, "bytes"),
    )


def count_parameters(directory: Path, *, tied: bool) -> tuple[int | None, str]:
    """The number of elements in a directory's safetensors headers, and their dtypes. `tied`: an output layer stored next to the
    embeddings is not counted."""
    shapes: dict[str, tuple[int, str]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with suppress(OSError, ValueError):
            for name, entry in safetensors_header(file)[0].items():
                shapes[name] = (math.prod(entry["shape"]), str(entry["dtype"]))
    if tied and any(name.endswith("embed_tokens.weight") for name in shapes):
        shapes.pop("lm_head.weight", None)
    if not shapes:
        return None, ""
    return sum(size for size, _ in shapes.values()), ", ".join(sorted({dtype for _, dtype in shapes.values()}))


def safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte where the tensors begin. Raises OSError or ValueError for an invalid file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, _HEADER_LIMIT)))
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length


def _licence(directory: Path, original: Mapping[str, Any]) -> tuple[str | None, str]:
    """The licence and where it is stated: the model card, the converted GGUF file, or the wheel."""
    stated = front_matter(directory / "README.md").get("license")
    if isinstance(stated, list):
        stated = ", ".join(map(str, stated))
    if stated:
        return str(stated), "model card"
    for key, where in (("license", "GGUF file"), ("wheel_license", "wheel")):
        if original.get(key):
            return str(original[key]), where
    return None, ""


def front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML header of a model card; empty if there is none."""
    try:
        found = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8"), flags=re.DOTALL)
        header = yaml.safe_load(found[1]) if found else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return header if isinstance(header, dict) else {}


def _number(config: Any, key: str) -> int | None:
    found = config.get(key)
    return found if isinstance(found, int) else None
