"""A model of which configuration and tokenizer are read, and neither weights nor their checksums."""

from dataclasses import fields
from functools import cached_property
from pathlib import Path

from fusechat.models.chat_model import Chatter
from fusechat.models.resolve import configuration
from fusechat.run.files import digest_json


class Unread(Chatter):
    @cached_property
    def identity(self) -> str:
        return digest_json([self.reference.parts, self.reference.sha256])

    @cached_property
    def directory(self) -> Path:
        return configuration(self.reference)

    @classmethod
    def of(cls, chatter: Chatter) -> "Unread":
        return cls(*(getattr(chatter, field.name) for field in fields(chatter)))
