"""Answers of one model to the prompts, shard by shard: by Transformers, by vLLM in this process, by a server.

A row is an answer: `id` of its prompt, `sample`, `text`, `tokens` (ids as they were generated, of a server none), `complete` (it
was ended by the end of turn or a stop string), and `why` it is no candidate, empty where it is one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from fusechat.data.conversations import Conversation
from fusechat.generate.shards import Row
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.recipe.generate import Generate

EMPTY, UNENDED = "it is empty", "it did not end within max_new_tokens"
BATCH_TOKENS = 16384  # of a batch at most, with the room for answers


class Author(Protocol):
    """Who answers prompts, one answer each in their order. `notes`: what the manifest should tell of how."""

    notes: dict[str, Any]

    def answer(self, prompts: Sequence[Prompt], advance: Callable[[int], None]) -> list[Answer | Missing]: ...

    def close(self) -> None: ...


class Local:
    """A model in this process, by Transformers. `loading`: as `Generator` has it."""

    def __init__(self, chat_model: ChatModel, **loading: Any) -> None:
        from fusechat.models.generator import Generator

        self._generator: Generator | None = Generator(chat_model, batch_tokens=BATCH_TOKENS, **loading)
        self.notes: dict[str, Any] = {}

    def answer(self, prompts: Sequence[Prompt], advance: Callable[[int], None]) -> list[Answer | Missing]:
        assert self._generator is not None
        found: dict[int, Answer | Missing] = {}

        def done(index: int, answer: Answer | Missing) -> None:
            found[index] = answer
            advance(1)

        self._generator.answer(prompts, done, [False] * len(prompts))
        if self._generator.most is not None:
            self.notes["answers_at_once"] = self._generator.most
        return [found[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Gives the model's memory back."""
        from fusechat.models.memory import free_memory

        self._generator = None
        free_memory()


def ask(author: Author, asked: Sequence[Conversation], how: Generate, advance: Callable[[int], None]) -> list[Row]:
    """The rows of some prompts: all samples of the first, then of the next."""
    prompts = [
        Prompt(
            one.id,
            tuple((message.role, message.content) for message in one.messages),
            how.temperature,
            how.max_new_tokens,
            top_p=how.top_p,
            sample=sample,
            about=one,
        )
        for one in asked
        for sample in range(how.samples)
    ]
    answers = author.answer(prompts, advance)
    return [_row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _row(prompt: Prompt, answer: Answer | Missing) -> Row:
    place = {"id": prompt.key, "sample": prompt.sample}
    if isinstance(answer, Missing):
        return {**place, "text": "", "tokens": [], "complete": False, "why": answer.reason}
    why = UNENDED if not answer.complete else EMPTY if not answer.text.strip() else ""
    return {**place, "text": answer.text, "tokens": list(answer.ids), "complete": answer.complete, "why": why}


def counts(rows: Iterable[Row]) -> dict[str, Any]:
    """Of some shards: answers, those that are candidates, why the others are none, and tokens generated."""
    rows = list(rows)
    return {
        "answers": len(rows),
        "candidates": sum(not row["why"] for row in rows),
        "left_out": dict(Counter(row["why"] for row in rows if row["why"])),
        "tokens": sum(len(row["tokens"]) for row in rows),
    }
