"""A model of which configuration and tokenizer are read, and neither weights nor their checksums."""

from dataclasses import fields
from functools import cached_property
from pathlib import Path

from fusechat.models.chat_model import ChatModel
from fusechat.models.resolve import configuration
from fusechat.run.files import digest_json


class WithoutWeights(ChatModel):
    @cached_property
    def identity(self) -> str:
        return digest_json([self.reference.parts, self.reference.sha256])

    @cached_property
    def directory(self) -> Path:
        return configuration(self.reference)

    @classmethod
    def of(cls, chat_model: ChatModel) -> "WithoutWeights":
        return cls(*(getattr(chat_model, field.name) for field in fields(chat_model)))
