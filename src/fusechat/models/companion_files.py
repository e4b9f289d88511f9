"""Files next to a model's weights: one list for copies of a model and for downloads from the hub."""

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

_PATTERNS = (  # for lower-case names
    *("generation_config.json", "*processor_config.json", "chat_template*.json", "*.jinja"),
    *("*tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json", "encoder.json", "merges.txt"),
    *("vocab.*", "*-vocab.*", "*.vocab", "*.model", "*.model.v[0-9]*", "*.tiktoken", "*.spm", "*.bpe", "*.codes"),
    "dict*.txt",
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("license*", "licence*", "copying*", "notice*", "use_policy*"),
)
_FETCHED = ("*.json", "*.txt", "*.py", "readme.md")  # fetched too: small, and some are read later
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz")
_FURTHER = "additional_chat_templates"


def beside(directory: Path) -> list[Path]:
    """The files of a model directory that a copy needs besides weights and config.json. If a configuration has `auto_map`, they
    include code and the files that the code names. No code is run."""
    names = {file.name for file in directory.iterdir() if file.is_file()}
    wanted = {name for name in names if _is_one(name, _PATTERNS)}
    if has_own_code(directory):
        wanted |= {name for name in names if name.endswith(".py")} | (names & named_in_code(directory))
    within = (directory / _FURTHER).glob("*.jinja")
    modules = (file for module in modules_of(directory) for file in (directory / module).rglob("*"))
    return sorted(file for file in {*(directory / name for name in wanted), *within, *modules} if file.is_file())


def to_fetch(files: Iterable[str], directory: Path | None = None) -> list[str]:
    """The files of a repository to fetch, without weights. `directory`: has its top-level files, which name others."""
    own = named_in_code(directory) if directory and has_own_code(directory) else set()
    modules = modules_of(directory) if directory else []
    wanted = []
    for file in files:
        path = PurePosixPath(file)
        if len(path.parts) == 1:
            wanted += [file] if _is_one(file, (*_PATTERNS, *_FETCHED)) or file in own else []
        elif (str(path.parent), path.suffix) == (_FURTHER, ".jinja") or any(map(path.is_relative_to, modules)):
            wanted.append(file)
    return wanted


def weight_files(files: Iterable[str], directory: Path) -> list[str]:
    """The weight files of a repository: those in the index in `directory`, or the usual single file, or all top-level ones that
    are not a copy in another format."""
    there = {file for file in files if "/" not in file and file.endswith(".safetensors")}
    index = read_json_of(directory / "model.safetensors.index.json")
    named = set(map(str, index["weight_map"].values())) if isinstance(index.get("weight_map"), dict) else set()
    usual = there & {*named, "model.safetensors"}
    return sorted(usual or {file for file in there if not file.startswith("consolidated")} or there)


def has_own_code(directory: Path) -> bool:
    """Whether a configuration names custom code."""
    return any("auto_map" in read_json_of(directory / f"{name}.json") for name in ("config", "tokenizer_config"))


def named_in_code(directory: Path) -> set[str]:
    """File names in a model's code, such as its tokenizer's files, without weights."""
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in directory.glob("*.py"))
    found = set(re.findall(r"[\"']([\w-][\w.-]*\.\w+)[\"']", text))
    return {
        name
        for name in found
        if not name.endswith((*_WEIGHTS, ".index.json")) and name not in ("config.json", "README.md")
    }


def modules_of(directory: Path) -> list[str]:
    """The directories of sentence-transformers' modules (pooling and others) in a model directory."""
    modules = read_json_of(directory / "modules.json", list)
    paths = [module.get("path") for module in modules if isinstance(module, dict)]
    return [path for path in paths if isinstance(path, str) and re.fullmatch(r"\w[\w-]*", path)]


def read_json_of(file: Path, kind: type = dict) -> Any:
    """The content of a JSON file, or an empty `kind` if it has another type or cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def _is_one(name: str, patterns: tuple[str, ...]) -> bool:
    return not name.endswith(_WEIGHTS) and any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
