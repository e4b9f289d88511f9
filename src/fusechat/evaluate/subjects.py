"""The models that are measured, as the command line names them: a model reference, or a server that serves one already.

MODEL          a directory, a hub id, a .gguf file, a wheel: reference
URL#NAME       model NAME of an OpenAI-compatible server: http://127.0.0.1:8000/v1#mixtral
LABEL=MODEL    either, under another name in tables
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusechat.errors import RecipeError
from fusechat.models.chat_model import ChatModel, with_template
from fusechat.models.dates import day_of
from fusechat.models.reference import Reference

_LABELLED = re.compile(r"(?P<label>[\w][\w.-]*)=(?P<model>.+)", re.DOTALL)
_URL = re.compile(r"(?P<url>https?://[^#]+)(#(?P<name>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Server:
    """A model that a server at `url` serves as `name`."""

    url: str
    name: str


@dataclass(frozen=True)
class Subject:
    """`role`: pivot, source, target or fused; empty for a model given by itself. `label`: unique, what tables call it. Either
    `chat_model` or `server` tells what it is."""

    role: str
    label: str
    chat_model: ChatModel | None = None
    server: Server | None = None
    shown: str | None = None  # what results call it, where `label` tells it from the others of its run
    name: str | None = None  # of a model of a run: pivot, fused, source-NAME, target-NAME

    @property
    def identity(self) -> str:
        """What its answers depend on. Of a server only its model's name is known."""
        if self.server is not None:
            return f"served:{self.server.name}"
        assert self.chat_model is not None
        return self.chat_model.tokenizer_identity

    @property
    def folder(self) -> str:
        """A name for files."""
        return re.sub(r"[^\w.-]+", "_", self.label).strip("._") or "model"

    def local(self, suite: str) -> ChatModel:
        """The model, where a suite needs its probabilities. Raises RecipeError for one that is behind a server."""
        if self.chat_model is None:
            raise RecipeError(f"{self.label}: {suite} needs the model itself, not a server; name its directory")
        return self.chat_model


def parse_model(text: str, chat_template: str | None = None) -> Subject:
    """A subject without a role. `chat_template`: the name of one of its own, or a file.
    Raises ModelError where nothing is of that name, RecipeError for half of one."""
    labelled = None if Path(text).exists() else _LABELLED.fullmatch(text)
    label, model = (labelled["label"], labelled["model"]) if labelled else (None, text)
    url = _URL.fullmatch(model)
    if url:
        if not url["name"]:
            shown = "a server's URL" if re.search(r"[@?]", model) else url["url"]  # it may hold a key
            raise RecipeError(f"{shown}: does not say which model; add its name, as in {shown}#NAME")
        return Subject("", label or url["name"], server=Server(url["url"], url["name"]))
    if not model:  # a path that is empty is where we are
        raise RecipeError("MODEL is empty: give a directory or another reference")
    path, reference = Path(model).expanduser(), Reference.named(model)
    name = label or (model.rstrip("/") if path.is_dir() else reference.label)
    chat_model = ChatModel(name, reference, date=day_of(path.resolve()))
    return Subject("", name, chat_model=with_template(chat_model, chat_template))


def check_labels(subjects: Sequence[Subject]) -> None:
    """Raises RecipeError for two models that tables or files would call the same."""
    seen: dict[str, str] = {}
    for subject in subjects:
        if subject.folder in seen:
            raise RecipeError(f"{subject.label}: two models of this name; give one another name, as in LABEL=MODEL")
        seen[subject.folder] = subject.label
