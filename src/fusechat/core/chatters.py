"""A chat LLM that takes part in a fusion: its reference, its name in the work directory, its template."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat.core.files import digest_json
from fusechat.core.references import Reference, identity, local_directory


@dataclass(frozen=True)
class Chatter:
    """`name` is `pivot` or the source's key in the recipe; `chat_template` overrides the model's own."""

    name: str
    reference: Reference
    chat_template: str | None = None

    @cached_property
    def identity(self) -> str:
        """Fingerprint of weights, configuration and tokenizer."""
        return identity(self.reference)

    @cached_property
    def directory(self) -> Path:
        """Local model directory; fetched and converted the first time that it is asked for."""
        return local_directory(self.reference)

    @property
    def tokenizer_identity(self) -> str:
        """What the tokens of a conversation depend on."""
        return digest_json([self.identity, self.chat_template, self.reference.trust_remote_code])

    def tokenizer(self) -> Any:
        from fusechat.core.tokenizer import load_tokenizer

        return load_tokenizer(self.directory, trust_remote_code=self.reference.trust_remote_code)

    def class_tokenizer(self) -> Any | None:
        """What Transformers would take for the tokenizer by itself, where that is another one."""
        from fusechat.core.tokenizer import class_tokenizer

        return class_tokenizer(self.directory, trust_remote_code=self.reference.trust_remote_code)

    def template(self) -> Any:
        from fusechat.core.templates import ChatTemplate

        name = f"{self.name} ({self.reference})"
        return ChatTemplate(self.tokenizer(), self.chat_template, name, by_class=self.class_tokenizer())

    def vocabulary_size(self) -> int:
        """How many tokens the model knows; a padded vocabulary has more than the tokenizer."""
        from fusechat.core.models import vocabulary_size

        return vocabulary_size(self.directory, trust_remote_code=self.reference.trust_remote_code)

    def positions(self) -> int | None:
        """How many tokens the model is made for, as far as its configuration says so."""
        from fusechat.core.models import read_configuration

        trust = self.reference.trust_remote_code
        text = read_configuration(self.directory, trust_remote_code=trust).get_text_config()
        return getattr(text, "max_position_embeddings", None)

    def model(self, *, dtype: str, device: Any, **spread: Any) -> Any:
        """`spread`: `device_map` and `offload` of `load_model`."""
        from fusechat.core.models import load_model

        trust = self.reference.trust_remote_code
        return load_model(self.directory, dtype=dtype, device=device, trust_remote_code=trust, **spread)
