"""How likely a model finds answers: nats over the content's bytes, the end of turn counted as one byte more.

A row is a distinct answer of one author to a prompt: `id` of the prompt, `sample` that gave it first, `nll` in nats, `bytes` with
the end of turn's, `tokens`, as many as the model scored, or null and `why` it cannot. A template without end of turn has neither
its nll nor its byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.data.conversations import Conversation
from fusechat.data.prepared import Prepared
from fusechat.data.prompts import answered, read_prompts
from fusechat.generate.backends import Nll, open_scorer, share
from fusechat.models.tokenise import RejectedError, prepare_conversation
from fusechat.recipe.schema import Recipe
from fusechat.run.shards import Making, Row, Shards, make

SCORES = "scores"  # the kind of these shards


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The candidates among some answers, each text once for a prompt."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if not row["why"]:
            found.setdefault((row["id"], row["text"]), row)
    return list(found.values())


def scores(
    rows: Sequence[Row], prompts: Mapping[str, Conversation], template: Any, nll: Nll, *, max_length: int
) -> list[Row]:
    """The scores of the candidates among `rows`, by the model whose template and `nll` these are."""
    candidates = distinct(rows)
    found: list[Row] = [{"id": row["id"], "sample": row["sample"], "nll": None, "bytes": None} for row in candidates]
    prepared: list[Prepared] = []
    places: list[int] = []
    for place, row in enumerate(candidates):
        conversation = answered(prompts[row["id"]], row["text"])
        try:
            prepared.append(prepare_conversation(conversation, template, max_length=max_length)[0])
            places.append(place)
        except RejectedError as error:
            found[place]["why"] = str(error)
    for index, values in nll(prepared):
        total, one, row = float(values.astype(np.float64).sum()), prepared[index], found[places[index]]
        if np.isfinite(total):
            size = int(one.content_bytes.sum()) + int(one.end_of_turn.any())
            row |= {"nll": total, "bytes": size, "tokens": len(values)}
        else:
            row["why"] = "its values are not finite"
    return found


def score(directory: Path, recipe: Recipe, scorer: str, author: str, answers: Shards) -> dict[str, Any]:
    """Writes the shards of this process that are missing; returns the counts of all of them."""
    prompts = {one.id: one for one in read_prompts(recipe.read_sets(author)).conversations}

    @contextmanager
    def opened() -> Iterator[Making]:
        chat_model = recipe.chat_model(scorer)
        template = chat_model.template()
        with open_scorer(directory, recipe, chat_model) as nll:
            yield lambda rows: scores(rows, prompts, template, nll, max_length=recipe.data.max_length)

    mine = share(recipe, scorer, answers.count)
    return make(Shards(directory, SCORES), mine, answers, opened(), f"scores of {author} by {scorer}")
