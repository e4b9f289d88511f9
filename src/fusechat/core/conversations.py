"""Conversations: read from JSONL, JSON, Parquet or a hub id, in `messages` or ShareGPT form, one meaning for both."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any

from fusechat.core.cache import known_digest
from fusechat.errors import DataError, first_line

_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES = ("system", "user", "assistant")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Message:
    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Conversation:
    """`id` is a hash of the content: equal conversations have equal ids, wherever they come from."""

    messages: tuple[Message, ...]
    where: str  # file and line, for a person

    @property
    def id(self) -> str:
        text = json.dumps([[message.role, message.content] for message in self.messages])
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def responses(self) -> list[str]:
        return [message.content for message in self.messages if message.role == "assistant"]


@dataclass(frozen=True)
class Malformed:
    """A record that is no conversation."""

    where: str
    reason: str


@dataclass(frozen=True)
class DataSet:
    """A file of conversations, or a data set of the hub. `name` is unique in a recipe; `on_error` is `stop` or `skip`. `split`: of
    a hub data set, None for `train`. `limit`: so many of the conversations at most, a sample: those whose ids come first. It is the
    same in any order of the records, and a larger one contains it."""

    name: str
    path: str
    on_error: str = "stop"
    split: str | None = None
    limit: int | None = None

    def identity(self) -> str:
        """What changes when the content does: the SHA-256 of a file, the commit of a hub data set; and what is taken of it."""
        path = self.local()
        whole = f"hub:{self.path}@{path.name}" if path.is_dir() else f"sha256:{known_digest(path)}"
        taken = (("split", self.split), ("limit", self.limit))
        return " ".join([whole, *(f"{key}={value}" for key, value in taken if value is not None)])

    def local(self) -> Path:
        """The file, or the directory to which a hub data set was fetched."""
        path = Path(self.path)
        if path.is_file():
            if path.suffix not in _SUFFIXES:
                raise DataError(f"{self.path}: unknown kind of data file; use {', '.join(_SUFFIXES)}")
            if self.split is not None:
                raise DataError(f"{self.path}: is a file, which has no split {self.split}")
            return path
        if path.is_dir():
            raise DataError(f"{self.path}: is a directory; name the file of conversations in it")
        if path.suffix in _SUFFIXES or not _HUB_ID.fullmatch(self.path):
            raise DataError(f"{self.path}: no such file")
        return _fetch_hub_data(self.path)


@dataclass(frozen=True)
class Questions:
    """A file of an evaluation's questions, which `reader` makes conversations of; they have no answers."""

    name: str
    path: str
    reader: Callable[[Path], Iterable[Conversation]]

    def identity(self) -> str:
        return f"sha256:{known_digest(Path(self.path))}"

    def read(self) -> Iterable[Conversation]:
        return self.reader(Path(self.path))


def read_conversations(data: DataSet) -> Iterator[Conversation | Malformed]:
    """Every record of a data set in its order, or every one of the sample. Malformed ones are yielded all; the caller decides what
    they mean."""
    if data.limit is None:
        yield from _conversations(data)
        return
    ids = {one.id for one in _conversations(data) if isinstance(one, Conversation)}
    sample = set(nsmallest(data.limit, ids))
    yield from (one for one in _conversations(data) if isinstance(one, Malformed) or one.id in sample)


def _conversations(data: DataSet) -> Iterator[Conversation | Malformed]:
    for where, record in _records(data):
        if isinstance(record, Malformed):
            yield record
            continue
        try:
            yield Conversation(messages=_messages(record), where=where)
        except ValueError as error:
            yield Malformed(where, str(error))


def _records(data: DataSet) -> Iterator[tuple[str, Any]]:
    path = data.local()
    if path.is_dir():
        yield from _hub(data.path, path, data.split or "train")
    elif path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".json":
        yield from _json(path)
    else:
        yield from _parquet(path)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                yield where, json.loads(raw.decode("utf-8").rstrip("\r\n"))
            except UnicodeDecodeError:
                yield where, Malformed(where, "not UTF-8")
            except json.JSONDecodeError as error:
                yield where, Malformed(where, f"not JSON ({error.msg}, column {error.colno})")
            except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
                yield where, Malformed(where, f"not JSON ({error})")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: holds {type(records).__name__}, not a list of conversations")
    yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, record {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not Parquet past record {number} ({error})") from error


def _hub(name: str, directory: Path, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # slow to import, and few need it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says of an error is said below
    number = 0
    try:
        for row in datasets.load_dataset(str(directory), split=split, streaming=True):
            number += 1
            yield f"{name}, record {number}", row
    except Exception as error:  # of many kinds; all mean that the data cannot be read
        raise DataError(f"{name}: cannot be read past record {number} ({first_line(error)})") from error


def _messages(record: Any) -> tuple[Message, ...]:
    if not isinstance(record, dict):
        raise ValueError(f"a conversation is an object, not {type(record).__name__}")
    if isinstance(record.get("messages"), list):
        turns, role_key, text_key, roles = record["messages"], "role", "content", {role: role for role in _ROLES}
    elif isinstance(record.get("conversations"), list):
        turns, role_key, text_key, roles = record["conversations"], "from", "value", _SHAREGPT_ROLES
    else:
        raise ValueError('neither "messages" nor "conversations" holds a list')
    return tuple(_message(turn, role_key, text_key, roles, number) for number, turn in enumerate(turns, 1))


def _message(turn: Any, role_key: str, text_key: str, roles: dict[str, str], number: int) -> Message:
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise ValueError(f'message {number} lacks "{role_key}" or "{text_key}"')
    role, text = turn[role_key], turn[text_key]
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"message {number} has unknown role {role!r} (known: {', '.join(roles)})")
    if not isinstance(text, str):
        raise ValueError(f'"{text_key}" of message {number} is {type(text).__name__}, not text')
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise ValueError(f"message {number} holds half a surrogate pair, which is not text")
    return Message(roles[role], text)


def _fetch_hub_data(reference: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds; all mean that the data cannot be had
        raise DataError(
            f"{reference}: no such file, and no data set of that name could be fetched ({first_line(error)})"
        ) from error
