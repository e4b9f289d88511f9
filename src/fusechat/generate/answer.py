"""Answers of one model to the prompts, shard by shard.

A row is an answer: `id` of its prompt, `sample`, `text`, `tokens` (ids as they were generated, of a server none), of a
server `received` (how many tokens, where it tells), `complete` (it
was ended by the end of turn or a stop string), and `why` it is no candidate, empty where it is one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fusechat.data.conversations import Conversation, DataSet
from fusechat.data.prompts import read_prompts
from fusechat.generate.backends import Author, Served, open_author, share
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.verify import needs_reference
from fusechat.recipe.generate import Generate
from fusechat.recipe.schema import Recipe
from fusechat.run.progress import Advance, progress
from fusechat.run.shards import Row, Shards, slices

ANSWERS = "answers"  # the kind of these shards
EMPTY, UNENDED = "it is empty", "it did not end within max_new_tokens"


def answer(directory: Path, recipe: Recipe, name: str, sets: list[DataSet]) -> dict[str, Any]:
    """Writes the shards of this process that are missing; returns the counts of all of them."""
    how = recipe.generate
    assert how is not None
    prompts = read_prompts(sets, needs_reference=_needs_reference(how))
    every = slices(prompts.conversations, recipe.capture.shard_conversations)
    shards, mine = Shards(directory, ANSWERS), share(recipe, name, len(every))
    missing, notes = shards.missing(mine), {}
    if missing:
        asked = {number: prompts_of(every[number], how) for number in missing}
        with open_author(directory, recipe, name, [one for part in asked.values() for one in part]) as author:
            for number, rows in _rows(author, asked, name):
                shards.write(number, rows)
            notes = author.notes
    return {**prompts.counts, **counts(row for number in mine for row in shards.read(number)), **notes}


def _needs_reference(how: Generate) -> str:
    """What will need the answer in each record, so that it is missed before anybody answers."""
    verifier = how.choose.verifier
    return f"the verifier {verifier}" if verifier is not None and needs_reference(verifier) else ""


def _rows(author: Author, asked: dict[int, list[Prompt]], name: str) -> Iterator[tuple[int, list[Row]]]:
    """The rows of each shard as they come: of a server all at once, for it answers in an order of its own."""
    if isinstance(author, Served):
        rows = iter(ask(author, [one for part in asked.values() for one in part], lambda amount=1, note="": None))
        yield from ((number, list(islice(rows, len(part)))) for number, part in asked.items())
        return
    with progress(f"answers of {name}", sum(map(len, asked.values())), "answers") as advance:
        for number, part in asked.items():
            yield number, ask(author, part, advance)


def prompts_of(asked: Sequence[Conversation], how: Generate) -> list[Prompt]:
    """All samples of the first prompt, then of the next."""
    texts = [tuple((message.role, message.content) for message in one.messages) for one in asked]
    return [
        Prompt(one.id, said, how.temperature, how.max_new_tokens, top_p=how.top_p, sample=sample, about=one)
        for one, said in zip(asked, texts, strict=True)
        for sample in range(how.samples)
    ]


def ask(author: Author, prompts: Sequence[Prompt], advance: Advance) -> list[Row]:
    """A row for each prompt."""
    answers = author.answer(prompts, advance)
    return [_row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _row(prompt: Prompt, answer: Answer | Missing) -> Row:
    place = {"id": prompt.key, "sample": prompt.sample}
    if isinstance(answer, Missing):
        return {**place, "text": "", "tokens": [], "complete": False, "why": answer.reason}
    why = UNENDED if not answer.complete else EMPTY if not answer.text.strip() else ""
    row = {**place, "text": answer.text, "tokens": list(answer.ids), "complete": answer.complete, "why": why}
    return row if answer.ids or not answer.tokens else {**row, "received": answer.tokens}


def counts(rows: Iterable[Row]) -> dict[str, Any]:
    """Of some shards: answers, those that are candidates, why the others are none, and tokens generated."""
    rows = list(rows)
    return {
        "answers": len(rows),
        "candidates": sum(not row["why"] for row in rows),
        "left_out": dict(Counter(row["why"] for row in rows if row["why"])),
        "tokens": sum(len(row["tokens"]) or row.get("received", 0) for row in rows),
    }
