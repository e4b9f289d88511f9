"""Reads conversations from JSONL, JSON, Parquet or a hub data set, in any of the usual formats."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import nsmallest
from pathlib import Path
from typing import Any

from fusechat.data.data_files import SUFFIXES, file_records, hub_records, suffix_of
from fusechat.data.messages import Conversation, Malformed, Message, join_turns
from fusechat.data.records import conversation_of, prompt_of
from fusechat.errors import DataError, first_line
from fusechat.run.cache import known_digest

__all__ = ["Conversation", "DataSet", "Malformed", "Message", "Questions", "read_conversations", "read_records"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class DataSet:
    """A file of conversations, or a data set of the hub. `name` is unique in a recipe.

    `on_error`: `stop` or `skip`. `split`: of a hub data set, None for `train`. `limit`: a sample of at most this many
    conversations, those with the first ids: it does not depend on the order of records, and a larger one contains it.
    `join_turns`: consecutive answers become one, for every model. `commit`: of a hub data set, None for its newest. `prompts`:
    drop the answers that will be generated; they may be missing. `chosen`: written by the run itself, at `path` in its work
    directory; `author`: only this model's answers.
    """

    name: str
    path: str
    on_error: str = "stop"
    split: str | None = None
    limit: int | None = None
    join_turns: bool = False
    commit: str | None = None
    prompts: bool = False
    chosen: bool = False
    author: str | None = None

    def within(self, workdir: Path) -> "DataSet":
        """With the path in `workdir`, if the run writes the set."""
        return replace(self, path=str(workdir / self.path)) if self.chosen else self

    @property
    def is_hub(self) -> bool:
        """Whether it is a data set of the hub."""
        path = Path(self.path)
        return not path.exists() and not suffix_of(path) and _HUB_ID.fullmatch(self.path) is not None

    def identity(self) -> str:
        """A fingerprint of the content: the SHA-256 of a file, or the commit of a hub data set, and the settings that select
        from it. For a set that the run writes, only these settings: its steps determine the content."""
        if self.chosen:
            return f"chosen author={self.author}" if self.author else "chosen"
        commit = (self.commit or self.local().name) if self.is_hub else None
        whole = f"hub:{self.path}@{commit}" if commit else f"sha256:{known_digest(self.local())}"
        taken = (("split", self.split), ("limit", self.limit), ("prompts", self.prompts or None))
        return " ".join([whole, *(f"{key}={value}" for key, value in taken if value is not None)])

    def local(self) -> Path:
        """The file, or the directory with the fetched hub data set. Raises DataError."""
        path = Path(self.path)
        if path.is_file():
            if not suffix_of(path):
                raise DataError(f"{self.path}: unknown kind of data file; use {', '.join(SUFFIXES)}")
            if self.split is not None:
                raise DataError(f"{self.path}: is a file, which has no split {self.split}")
            if self.commit is not None:
                raise DataError(f"{self.path}: is a file, which has no commit")
            return path
        if path.is_dir():
            raise DataError(f"{self.path}: is a directory; name the file of conversations in it")
        if suffix_of(path) or not _HUB_ID.fullmatch(self.path):
            raise DataError(f"{self.path}: no such file")
        return _fetch_hub_data(self.path, self.commit)


@dataclass(frozen=True)
class Questions:
    """A file of an evaluation's questions. `reader` turns it into conversations without answers."""

    name: str
    path: str
    reader: Callable[[Path], Iterable[Conversation]]

    def identity(self) -> str:
        """A fingerprint of the file."""
        return f"sha256:{known_digest(Path(self.path))}"

    def read(self) -> Iterable[Conversation]:
        """The questions as conversations."""
        return self.reader(Path(self.path))


@dataclass(frozen=True)
class Read:
    """A record of a data set: the conversation read from it, the whole one before answers are dropped, and the record."""

    conversation: Conversation
    whole: Conversation
    record: dict[str, Any]


def read_conversations(data: DataSet) -> Iterator[Conversation | Malformed]:
    """Yields every record of a data set, or of its sample, in order, malformed ones included; the caller decides about these."""
    for found in read_records(data):
        yield found if isinstance(found, Malformed) else found.conversation


def read_records(data: DataSet) -> Iterator[Read | Malformed]:
    """As `read_conversations`, with the records."""
    if data.limit is None:
        yield from _read(data)
        return
    ids = {found.conversation.id for found in _read(data) if isinstance(found, Read)}
    sample = set(nsmallest(data.limit, ids))
    yield from (found for found in _read(data) if isinstance(found, Malformed) or found.conversation.id in sample)


def _read(data: DataSet) -> Iterator[Read | Malformed]:
    for where, record in _records(data):
        if isinstance(record, Malformed):
            yield record
            continue
        if data.author is not None and isinstance(record, dict) and record.get("author") != data.author:
            continue
        try:
            whole = conversation_of(record, where, answered=not data.prompts)
            if data.join_turns:
                messages = join_turns(whole.messages, roles=("assistant",))
                whole = replace(whole, messages=messages, joined=len(messages) < len(whole.messages))
            yield Read(prompt_of(whole) if data.prompts else whole, whole, record)
        except ValueError as error:
            yield Malformed(where, str(error))


def _records(data: DataSet) -> Iterator[tuple[str, Any]]:
    path = data.local()
    yield from hub_records(data.path, path, data.split or "train") if path.is_dir() else file_records(path)


def _fetch_hub_data(reference: str, commit: str | None) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=commit or revision or None, repo_type="dataset"))
    except Exception as error:  # of many types; all mean that the data is unavailable
        raise DataError(
            f"{reference}: no such file, and no data set of that name could be fetched ({first_line(error)})"
        ) from error
