"""Conversations: read from JSONL, JSON, Parquet or a hub id, in any of the usual forms, one meaning for all."""

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
    """A file of conversations, or a data set of the hub. `name` is unique in a recipe; `on_error` is `stop` or `skip`. `split`: of
    a hub data set, None for `train`. `limit`: so many of the conversations at most, a sample: those whose ids come first. It is the
    same in any order of the records, and a larger one contains it. `join_turns`: answers in a row are one, for every model.
    `commit`: of a hub data set, None for its newest. `prompts`: without the answers that are to be made anew, and they may lack.
    `chosen`: what a run makes itself, at `path` in its work directory; `author`: the answers of this model alone."""

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
        """With the file of a set that the run in `workdir` makes."""
        return replace(self, path=str(workdir / self.path)) if self.chosen else self

    @property
    def is_hub(self) -> bool:
        path = Path(self.path)
        return not path.exists() and not suffix_of(path) and _HUB_ID.fullmatch(self.path) is not None

    def identity(self) -> str:
        """What changes when the content does: the SHA-256 of a file, the commit of a hub data set; and what is taken of it. Of
        what a run makes, whose content its steps know, what is taken of it alone."""
        if self.chosen:
            return f"chosen author={self.author}" if self.author else "chosen"
        commit = (self.commit or self.local().name) if self.is_hub else None
        whole = f"hub:{self.path}@{commit}" if commit else f"sha256:{known_digest(self.local())}"
        taken = (("split", self.split), ("limit", self.limit), ("prompts", self.prompts or None))
        return " ".join([whole, *(f"{key}={value}" for key, value in taken if value is not None)])

    def local(self) -> Path:
        """The file, or the directory to which a hub data set was fetched."""
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
    """A file of an evaluation's questions, which `reader` makes conversations of; they have no answers."""

    name: str
    path: str
    reader: Callable[[Path], Iterable[Conversation]]

    def identity(self) -> str:
        return f"sha256:{known_digest(Path(self.path))}"

    def read(self) -> Iterable[Conversation]:
        return self.reader(Path(self.path))


@dataclass(frozen=True)
class Read:
    """A record of a data set: what it is read as, the whole conversation in it, which has more than a prompt, and the record."""

    conversation: Conversation
    whole: Conversation
    record: dict[str, Any]


def read_conversations(data: DataSet) -> Iterator[Conversation | Malformed]:
    """Every record of a data set in its order, or every one of the sample. Malformed ones are yielded all; the caller decides what
    they mean."""
    for found in read_records(data):
        yield found if isinstance(found, Malformed) else found.conversation


def read_records(data: DataSet) -> Iterator[Read | Malformed]:
    """As `read_conversations`, with all that the records hold."""
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
    except Exception as error:  # the hub client raises many kinds; all mean that the data is unavailable
        raise DataError(
            f"{reference}: no such file, and no data set of that name could be fetched ({first_line(error)})"
        ) from error
