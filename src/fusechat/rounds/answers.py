"""A target's answers to the prompts of a round, shard by shard; and these as conversations of the target and of their teachers.

A row is an answer: `id` of its prompt, `teacher`, `tokens` (ids as they were sampled) and `end`, the token that ended it (null for
none); `text`, what these say; `why` nobody learns of it, empty where somebody does.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fusechat.data.conversations import Conversation
from fusechat.data.prepared import FILE, Prepared, write_prepared
from fusechat.data.prompts import answered
from fusechat.models.answers import Missing, Prompt
from fusechat.models.asking import Asking
from fusechat.models.chat_model import ChatModel
from fusechat.models.token_bytes import token_bytes
from fusechat.models.tokenise import RejectedError, prepare_conversation
from fusechat.recipe.schema import Recipe
from fusechat.rounds.prompts import Taught
from fusechat.rounds.sampled import EMPTY, Opening, Sampled, sampled
from fusechat.run import ranks
from fusechat.run.progress import progress
from fusechat.run.shards import Row, Shards, slices

ANSWERS = "answers"  # the kind of these shards
Open = Callable[[Path, Recipe, ChatModel, Sequence[Prompt]], AbstractContextManager[Any]]  # who answers


class Reader:
    """What a target's tokens say after its prompts."""

    def __init__(self, student: ChatModel, *, max_length: int) -> None:
        self._asking, self._max_length = Asking(student), max_length
        self._table = token_bytes(self._asking.tokenizer)
        self._opening = Opening.of(self._asking.template)

    def read(self, asked: Prompt, row: Row, identity: str) -> Sampled:
        prompt = self._asking.encode(asked)
        if isinstance(prompt, Missing):
            return Sampled(None)
        how: dict[str, Any] = {"max_length": self._max_length}
        return sampled(identity, prompt, row["tokens"], row["end"], self._table, self._opening, **how)


def asked(recipe: Recipe, one: Conversation, number: int) -> Prompt:
    """A prompt as it is asked in a round; each round draws other answers."""
    how = recipe.rounds
    assert how is not None
    texts = tuple((message.role, message.content) for message in one.messages)
    return Prompt(one.id, texts, how.temperature, how.max_new_tokens, sample=number, about=one)


def answer(
    directory: Path, recipe: Recipe, student: ChatModel, prompts: Sequence[Taught], number: int, open_model: Open
) -> dict[str, Any]:
    """Writes the shards of this process that are missing; returns the counts of all of them."""
    every = slices(prompts, recipe.capture.shard_conversations)
    is_spread = recipe.capture.backend == "transformers" and recipe.capture.device_map is not None
    mine = ranks.share(len(every), one_a_machine=is_spread)
    shards, notes = Shards(directory, ANSWERS), {}
    missing = shards.missing(mine)
    if missing:
        wanted = {at: [asked(recipe, one, number) for one, _ in every[at]] for at in missing}
        reader = Reader(student, max_length=recipe.data.max_length)
        with (
            open_model(directory, recipe, student, [one for part in wanted.values() for one in part]) as author,
            progress(f"answers of round {number}", sum(map(len, wanted.values())), "answers") as advance,
        ):
            for at, part in wanted.items():
                found = author.answer(part, advance)
                teachers = [teacher for _, teacher in every[at]]
                rows = [_row(*each, reader) for each in zip(part, teachers, found, strict=True)]
                shards.write(at, rows)
            notes = author.notes
    rows = [row for at in mine for row in shards.read(at)]
    why = Counter(row["why"] for row in rows if row["why"])
    return {"answers": len(rows), "tokens": sum(len(row["tokens"]) for row in rows), "left_out": dict(why), **notes}


def _row(prompt: Prompt, teacher: str, found: Any, reader: Reader) -> Row:
    row: Row = {"id": prompt.key, "teacher": teacher, "tokens": [], "end": None, "text": "", "why": ""}
    if isinstance(found, Missing):
        return {**row, "why": found.reason}
    row |= {"tokens": list(found.ids), "end": found.end}
    text = reader.read(prompt, row, prompt.key).text
    return {**row, "why": EMPTY} if text is None else {**row, "text": text}


def rows_of(directory: Path, teacher: str | None = None) -> list[Row]:
    """The answers of a finished step, or those of them that a source teaches."""
    rows = [row for part in Shards(directory, ANSWERS) for row in part]
    return rows if teacher is None else [row for row in rows if row["teacher"] == teacher and not row["why"]]


def student_rows(
    directory: Path,
    recipe: Recipe,
    student: ChatModel,
    prompts: Mapping[str, Conversation],
    rows: Sequence[Row],
    number: int,
) -> dict[str, Any]:
    """Writes the answers as the target's own tokens. Where there are none there may be no such model."""

    def made() -> Iterator[Prepared]:
        reader = Reader(student, max_length=recipe.data.max_length) if rows else None
        for row in rows:
            assert reader is not None
            found = reader.read(asked(recipe, prompts[row["id"]], number), row, identity_of(row, number)).rows
            assert found is not None
            yield found

    return {"conversations": write_prepared(directory / FILE, made())}


def teacher_rows(
    directory: Path,
    recipe: Recipe,
    teacher: ChatModel,
    prompts: Mapping[str, Conversation],
    rows: Sequence[Row],
    number: int,
) -> dict[str, Any]:
    """Writes the answers in a source's own template and tokens. What it cannot hold is counted, by why."""
    template, rejected, inexact = teacher.template(), Counter[str](), Counter[str]()
    prepare = partial(prepare_conversation, max_length=recipe.data.max_length, truncate="token")

    def made() -> Iterator[Prepared]:
        for row in rows:
            try:
                found, marks = prepare(answered(prompts[row["id"]], row["text"]), template)
            except RejectedError as error:
                rejected[str(error)] += 1
                continue
            inexact.update(key for key in ("offsets", "truncated") if marks[key])
            yield replace(found, id=identity_of(row, number))

    return {"conversations": write_prepared(directory / FILE, made()), "rejected": dict(rejected), **dict(inexact)}


def identity_of(row: Row, number: int) -> str:
    """Of an answer; a prompt has one in each round."""
    return f"{row['id']}-{number}"
