"""The weights of a model directory: safetensors, one file or sharded. Only headers are read at first."""

import json
import math
import os
import re
import resource
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

from fusechat.errors import ModelError, first_line
from fusechat.merge.architecture import Architecture, architecture_of
from fusechat.merge.kernels import BFLOAT16, FLOAT16, FLOAT32
from fusechat.merge.tensor import Stored
from fusechat.merge.values import stacks_of
from fusechat.models.facts import safetensors_header
from fusechat.models.load import read_configuration
from fusechat.models.resolve import ADAPTER

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
COMPARED = 1 << 24  # bytes of two tensors compared at once
SPARE = 64  # open files besides the models': libraries', the output's
FLOATS = {"F32": FLOAT32, "BF16": BFLOAT16, "F16": FLOAT16}
BYTES = {
    **dict.fromkeys(("I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: its file and first byte, its shape, and its dtype as safetensors names it (BF16)."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The number of bytes."""
        return self.size * BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory's tensors. `label` names the model in errors and reports. Its files stay open."""

    directory: Path
    label: str
    entries: dict[str, Entry]
    _handles: dict[Path, FileIO] = field(repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path, label: str) -> "Checkpoint":
        """Reads the headers. Raises ModelError for an incomplete file, or an index that does not match its files."""
        index = directory / INDEX
        names = _read_index(index) if index.is_file() else {}
        files = sorted(set(names.values())) or _without_index(directory)
        found: dict[str, Entry] = {}
        for file in (directory / name for name in files):
            for tensor, entry in _read_header(file).items():
                if names.get(tensor, file.name) == file.name:
                    if tensor in found:
                        raise ModelError(f"{file}: holds {tensor}, which {found[tensor].file.name} holds too")
                    found[tensor] = entry
        lacking = sorted(names.keys() - found.keys())
        if lacking:
            raise ModelError(f"{index}: says that {lacking[0]} is in {names[lacking[0]]}, which does not hold it")
        if not found:
            raise ModelError(f"{directory}: holds no tensors")
        _allow_open_files(len(files))
        handles = {directory / name: (directory / name).open("rb", buffering=0) for name in files}
        return cls(directory, label, found, handles)

    def stored(self, name: str) -> Stored:
        """The elements of a floating-point tensor, not yet read."""
        entry = self.entries[name]
        return Stored(FLOATS[entry.dtype], entry.size, self._handles[entry.file].fileno(), entry.start, self.label)

    def bytes(self, name: str, start: int, count: int) -> bytes:
        """Up to `count` bytes of a tensor from byte `start` on."""
        entry = self.entries[name]
        count = max(0, min(count, entry.bytes - start))
        read = os.pread(self._handles[entry.file].fileno(), count, entry.start + start)
        if len(read) < count:
            raise ModelError(f"{entry.file}: ends before {name} does; was it cut short meanwhile?")
        return read

    def read_ahead(self, name: str) -> None:
        """Asks the system to read a tensor from the disk in the background."""
        entry = self.entries[name]
        if hasattr(os, "posix_fadvise"):
            handle = self._handles[entry.file].fileno()
            os.posix_fadvise(handle, entry.start, entry.bytes, os.POSIX_FADV_WILLNEED)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_config(self.directory)

    @property
    def files(self) -> list[Path]:
        """The files with weights, each once."""
        return list(self._handles)

    @cached_property
    def architecture(self) -> Architecture | None:
        """The class that the configuration names, or None if it cannot be built."""
        return architecture_of(self.directory)

    @cached_property
    def modules(self) -> set[str]:
        """The names of the modules that have a tensor."""
        return {name[: match.start()] for name in self.entries for match in re.finditer(r"\.", name)}

    @cached_property
    def stacks(self) -> dict[str, int]:
        """The number of layers of each stack."""
        return stacks_of(self.entries)

    @property
    def depth(self) -> int | None:
        """The number of layers by the configuration, of the text model if there are several."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, dict) and isinstance(config.get("num_hidden_layers"), int):
                return int(config["num_hidden_layers"])
        return None

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors of the model are equal bit for bit. Reads both up to the first difference."""
        one, two = self.entries[name], self.entries[other]
        if one.dtype not in BYTES:
            raise ModelError(f"{name}: is stored as {one.dtype} in {self.label}; convert that model first")
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        starts = range(0, one.bytes, COMPARED)
        return all(self.bytes(name, start, COMPARED) == self.bytes(other, start, COMPARED) for start in starts)

    def is_tied(self) -> bool:
        """Whether the configuration ties the output embedding to the input embedding, for classes that cannot be built."""
        for config in (self.config.get("text_config"), self.config):
            if isinstance(config, dict) and "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        try:
            return bool(read_configuration(self.directory).get_text_config().tie_word_embeddings)
        except Exception:  # custom code: its default is unknown
            return False


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: is not a mapping of keys")
    return config


def _read_index(index: Path) -> dict[str, str]:
    """Tensor → file name. Rejects files outside the directory."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
            raise ValueError("weight_map is no mapping of tensors to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of safetensors files ({first_line(error)})") from error
    for name in sorted(set(names.values())):
        if "/" in name or "\\" in name or name in ("", ".", "..") or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: names {name!r}, which is no safetensors file in that directory")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index}: names {name!r}, and there is no such file in that directory")
    if WHOLE not in names.values() and (index.parent / WHOLE).is_file():
        raise ModelError(f"{index}: does not name {WHOLE}, which is there too; delete what is not the model")
    return names


def _without_index(directory: Path) -> list[str]:
    """The file that Transformers reads if present; else the shards by name; else all. Raises ModelError for a missing shard."""
    if (directory / WHOLE).is_file():
        return [WHOLE]
    names = sorted(file.name for file in directory.glob("*.safetensors") if file.name != ADAPTER)
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    usual = [match for match in shards if match[1] == "model"] or shards  # some models store their weights twice
    for wanted in range(1, int(usual[0][3]) + 1 if usual else 0):
        name, number, total = usual[0].groups()
        shard = f"{name}-{wanted:0{len(number)}d}-of-{total}.safetensors"
        if shard not in names:
            raise ModelError(f"{directory}: has {usual[0].string}, and neither {shard} nor {INDEX}")
    return [match.string for match in usual] or names


def _allow_open_files(more: int) -> None:
    """Raises the process's limit of open files, which is low by default: models may have hundreds of shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + more + SPARE
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file. safetensors validates the header and that the tensors fill the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {first_line(error)}") from error
    header, first = safetensors_header(file)
    return {
        name: Entry(file, first + part["data_offsets"][0], tuple(part["shape"]), part["dtype"])
        for name, part in header.items()
    }
