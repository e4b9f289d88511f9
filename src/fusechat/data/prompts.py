"""The prompts that models answer: in the order of their files, each once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusechat.data.conversations import Conversation, DataSet, Malformed, Message, read_records
from fusechat.data.records import reference_of
from fusechat.errors import DataError
from fusechat.run.progress import log


@dataclass(frozen=True)
class Prompts:
    """`conversations` end with what is asked; the id of one is its prompt's key. `data`: the sets that each stands in, by this key.
    `malformed`, `repeated`: records that give none; `unused`: keys of records that nothing but a verifier reads."""

    conversations: list[Conversation]
    data: dict[str, list[str]]
    malformed: int
    repeated: int
    unused: list[str]

    @property
    def counts(self) -> dict[str, Any]:
        found = {"malformed": self.malformed, "repeated": self.repeated, "unused_keys": self.unused}
        return {"prompts": len(self.conversations), **{key: value for key, value in found.items() if value}}

    def tell(self, *, unused: bool) -> None:
        """What a user should know of the records. `unused`: nothing reads what they hold beside prompts."""
        if self.malformed:
            log.warning("generate: %d malformed records are left out", self.malformed)
        if self.repeated:
            log.info("generate: %d records repeat a prompt, which is asked once", self.repeated)
        if self.unused and unused:
            log.warning("generate: keys of the records that nothing reads: %s", ", ".join(self.unused))


def answered(prompt: Conversation, text: str) -> Conversation:
    """The conversation in which `text` is the answer; nothing else is learnt of it."""
    return replace(prompt, messages=(*prompt.messages, Message("assistant", text)))


@dataclass(frozen=True)
class Asked:
    """What a verifier may know of a prompt: its record, the answer in it if it holds one, and where it stands."""

    record: dict[str, Any]
    reference: str | list[str] | None
    where: str


def read_prompts(sets: Sequence[DataSet], *, needs_reference: str = "") -> Prompts:
    """Raises DataError for what is no prompt, unless the set says to skip that, and where there is none; and for one without an
    answer beside it where something `needs_reference`."""
    found: dict[str, Conversation] = {}
    sets_of: dict[str, dict[str, None]] = {}
    malformed = repeated = 0
    unused: dict[str, None] = {}
    for data in sets:
        for one in read_records(data):
            if isinstance(one, Malformed):
                if data.on_error == "stop":
                    raise DataError(f"{one.where}: {one.reason}")
                malformed += 1
                continue
            if needs_reference and reference_of(one.whole, one.record) is None:
                raise DataError(f"{one.conversation.where}: holds no answer, which {needs_reference} needs")
            unused |= dict.fromkeys(key for key in one.whole.unused)
            repeated += one.conversation.id in found
            found.setdefault(one.conversation.id, one.conversation)
            sets_of.setdefault(one.conversation.id, {})[data.name] = None
    if not found:
        raise DataError(f"{', '.join(data.path for data in sets)}: holds no prompt that could be answered")
    return Prompts(
        list(found.values()), {key: list(names) for key, names in sets_of.items()}, malformed, repeated, sorted(unused)
    )


def read_asked(sets: Sequence[DataSet]) -> dict[str, Asked]:
    """By the prompt's key; of equal prompts the first counts."""
    found: dict[str, Asked] = {}
    for data in sets:
        for one in read_records(data):
            if not isinstance(one, Malformed) and one.conversation.id not in found:
                reference = reference_of(one.whole, one.record)
                found[one.conversation.id] = Asked(one.record, reference, one.conversation.where)
    return found
