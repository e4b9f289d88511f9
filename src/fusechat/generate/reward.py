"""Answers judged by a reward model: a sequence-classification model of Transformers that gives one number for a conversation.

A row is a distinct answer of one author to a prompt: `id` of the prompt, `sample` that gave it first, `reward`, or null and `why`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.data.conversations import Conversation
from fusechat.data.prompts import answered, read_prompts
from fusechat.generate.score import distinct
from fusechat.models.chat_model import ChatModel
from fusechat.models.templates import UnrenderableError
from fusechat.recipe.schema import Recipe
from fusechat.run import ranks
from fusechat.run.shards import Making, Row, Shards, make

REWARDS = "rewards"  # the kind of these shards


def reward(directory: Path, recipe: Recipe, chat_model: ChatModel, author: str, answers: Shards) -> dict[str, Any]:
    """Writes the shards of this process that are missing; returns the counts of all of them."""
    prompts = {one.id: one for one in read_prompts(recipe.read_sets(author)).conversations}

    @contextmanager
    def opened() -> Iterator[Making]:
        from fusechat.models.reward import RewardModel

        capture, template = recipe.capture, chat_model.template()
        how: dict[str, Any] = {"dtype": capture.dtype, "device": recipe.device, "batch_tokens": capture.batch_tokens}
        with closing(RewardModel(chat_model, **how)) as model:
            yield lambda rows: _rows(rows, prompts, template, model)

    return make(Shards(directory, REWARDS), ranks.share(answers.count), answers, opened(), f"rewards of {author}")


def _rows(rows: Sequence[Row], prompts: Mapping[str, Conversation], template: Any, model: Any) -> list[Row]:
    candidates = distinct(rows)
    found: list[Row] = [{"id": row["id"], "sample": row["sample"], "reward": None} for row in candidates]
    texts: dict[int, str] = {}
    for place, row in enumerate(candidates):
        conversation = answered(prompts[row["id"]], row["text"])
        try:
            texts[place] = template.render(conversation.messages, conversation).text
        except UnrenderableError as error:
            found[place]["why"] = str(error)
    for place, value in zip(texts, model.rewards(list(texts.values())), strict=True):
        if value is not None and np.isfinite(value):
            found[place]["reward"] = value
        else:
            found[place]["why"] = "it is too long for the reward model" if value is None else "its reward is not finite"
    return found
