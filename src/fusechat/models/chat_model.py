"""A chat LLM of a recipe: its reference, its name in the work directory, its template."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat.errors import RecipeError
from fusechat.models.dates import asks_for_the_day, is_dated
from fusechat.models.reference import Reference
from fusechat.models.resolve import configuration, find_cached, identity, local_directory
from fusechat.run.files import digest_json


@dataclass(frozen=True)
class ChatModel:
    """A chat LLM. `name` is `pivot` or the source's key in the recipe.

    `chat_template` replaces the model's own; `template_name` selects one of several. `variables`: JSON, template variables that
    a conversation may override. `date`: the date that the template sees. `stop`: strings that end its answers.
    """

    name: str
    reference: Reference
    chat_template: str | None = None
    template_name: str | None = None
    variables: str = ""
    date: str | None = None
    stop: tuple[str, ...] = ()

    @cached_property
    def identity(self) -> str:
        """Fingerprint of weights, configuration and tokenizer."""
        return identity(self.reference)

    @cached_property
    def directory(self) -> Path:
        """Local model directory, fetched and converted on first use. Raises ModelError."""
        return local_directory(self.reference)

    @property
    def tokenizer_identity(self) -> str:
        """A fingerprint of all that determines a conversation's tokens."""
        day = [self.date] if self.date and self._is_dated else []
        return digest_json([self.identity, self.chat_template, self.reference.trust_remote_code, *self._choices, *day])

    @property
    def template_key(self) -> Any:
        """The template's part of fingerprints."""
        return [self.chat_template, *self._choices] if self._choices else self.chat_template

    @property
    def _choices(self) -> list[str | None]:
        return [self.template_name, self.variables] if self.template_name or self.variables else []

    @cached_property
    def _is_dated(self) -> bool:
        """Whether the template reads the date. Wheels are inspected once fetched."""
        if self.chat_template is not None:
            return is_dated(self.chat_template)
        if self.reference.is_file and not self.reference.is_wheel:
            return asks_for_the_day(Path(self.reference.parts[0]))
        path = find_cached(self.reference) if self.reference.is_wheel else configuration(self.reference)
        return path is not None and asks_for_the_day(path)

    def tokenizer(self) -> Any:
        """The tokenizer of `tokenizer.json`. Raises ModelError."""
        from fusechat.models.tokenizer import load_tokenizer

        return load_tokenizer(self.directory, trust_remote_code=self.reference.trust_remote_code)

    def class_tokenizer(self) -> Any | None:
        """The tokenizer of Transformers' class, if it differs from `tokenizer.json`."""
        from fusechat.models.tokenizer import class_tokenizer

        return class_tokenizer(self.directory, trust_remote_code=self.reference.trust_remote_code)

    def template(self) -> Any:
        """The chat template. Raises ModelError."""
        from fusechat.models.templates import ChatTemplate

        name = f"{self.name} ({self.reference})"
        return ChatTemplate(
            self.tokenizer(),
            self.chat_template,
            name,
            name=self.template_name,
            variables=json.loads(self.variables or "{}"),
            date=self.date,
            by_class=self.class_tokenizer(),
        )

    def vocabulary_size(self) -> int:
        """The size of the model's vocabulary, padding included."""
        from fusechat.models.load import vocabulary_size

        return vocabulary_size(self.directory, trust_remote_code=self.reference.trust_remote_code)

    def positions(self) -> int | None:
        """The maximum length in tokens, if the configuration has one."""
        from fusechat.models.load import read_configuration

        trust = self.reference.trust_remote_code
        text = read_configuration(self.directory, trust_remote_code=trust).get_text_config()
        return getattr(text, "max_position_embeddings", None)

    def generation_config(self) -> Any:
        """The model's own generation settings."""
        from fusechat.models.load import generation_config

        return generation_config(self.directory, trust_remote_code=self.reference.trust_remote_code)

    def model(self, *, dtype: str, device: Any, **spread: Any) -> Any:
        """Loads the model. `spread`: `device_map` and `offload` of `load_model`."""
        from fusechat.models.load import load_model

        trust = self.reference.trust_remote_code
        return load_model(self.directory, dtype=dtype, device=device, trust_remote_code=trust, **spread)


def is_template_file(text: str) -> bool:
    """Whether a chat template is given as a file name: `template.jinja`."""
    return text.endswith((".jinja", ".jinja2", ".j2")) and "{" not in text and "\n" not in text


def with_template(chat_model: ChatModel, given: str | None) -> ChatModel:
    """With the chat template of a command-line option: a file, or the name of one of the model's own. Raises RecipeError."""
    if given is None:
        return chat_model
    if not is_template_file(given):
        return replace(chat_model, template_name=given)
    try:
        return replace(chat_model, chat_template=Path(given).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--chat-template {given}: cannot be read ({error})") from None
