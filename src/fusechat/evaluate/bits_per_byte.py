"""Bits per byte of held-out responses: nll of the response text over its UTF-8 bytes and ln 2, the end of turn left out.

It compares models whatever their tokenizer, since the bytes of a text are the same for all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusechat.evaluate.records import Measurement
from fusechat.models.teacher_forcing import Conversations, TeacherForcing

# conversation id → [nll in nats, bytes] of each of its responses
Responses = dict[str, list[tuple[float, int]]]


def score_responses(
    model: Any,
    conversations: Conversations,
    *,
    batch_tokens: int,
    advance: Callable[[int], None],
    name: str = "the model",
    keys: tuple[str, str] = ("--batch-tokens", "--max-length"),
) -> Responses:
    """The nll (nats, float64 sums of float32 terms) and bytes of every response. `batch_tokens`, `name`, `keys`: see
    `TeacherForcing`."""
    found: Responses = {one.id: [] for one in conversations}
    forced = TeacherForcing(model, batch_tokens=batch_tokens, name=name, keys=keys)
    for index, nll in forced.nll(conversations):
        one = conversations[index]
        of_response = [~one.end_of_turn & (one.response == number) for number in range(len(one.content_bytes))]
        found[one.id] = [
            (float(nll[rows].astype(np.float64).sum()), int(size))
            for rows, size in zip(of_response, one.content_bytes, strict=True)
        ]
        advance(1)
    return found


@dataclass(frozen=True)
class Score:
    """`value` bits per byte, None where there is nothing to measure; over `responses` that every model has, `missing` left out.
    `items`: conversation id → (bits, bytes) of those responses."""

    value: float | None
    bytes: int
    responses: int
    missing: int
    items: dict[str, tuple[float, float]]

    def measurement(self, data: str) -> Measurement:
        return Measurement(
            data,
            "bits_per_byte",
            self.items,
            self.missing,
            why="nothing to measure, or a value that is not finite" if self.value is None else None,
            higher_is_better=False,
            n=self.responses,
            more={"bytes": self.bytes},
        )


def compare(models: dict[str, Responses]) -> dict[str, Score]:
    """The score of each model over the responses that all of them have; a response that one lost is missing for all."""
    every = {
        (identity, index)
        for responses in models.values()
        for identity, r in responses.items()
        for index in range(len(r))
    }
    common = sorted(
        (identity, index)
        for identity, index in every
        if all(index < len(responses.get(identity, ())) for responses in models.values())
    )
    return {name: _score(responses, common, len(every) - len(common)) for name, responses in models.items()}


def _score(responses: Responses, common: list[tuple[str, int]], missing: int) -> Score:
    pairs = [responses[identity][index] for identity, index in common]
    nll, size = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    finite = bool(size) and math.isfinite(nll)
    items: dict[str, tuple[float, float]] = {}
    for (identity, _), (own, width) in zip(common, pairs, strict=True):
        bits, total = items.get(identity, (0.0, 0.0))
        items[identity] = bits + own / math.log(2), total + width
    return Score(nll / size / math.log(2) if finite else None, size, len(pairs), missing, items if finite else {})
