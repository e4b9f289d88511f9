"""Bits per byte of held-out responses: nll of the response text over its UTF-8 bytes and ln 2, the end of turn left out.

It compares models whatever their tokenizer, since the bytes of a text are the same for all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusechat.data.prepared import Prepared, PreparedSet
from fusechat.evaluate.records import Measurement
from fusechat.models.forward import collate, device_of, float_rows, gold_nll, length_batches, response_logits

# conversation id → [nll in nats, bytes] of each of its responses
Responses = dict[str, list[tuple[float, int]]]


@torch.inference_mode()
def score_responses(
    model: Any, conversations: PreparedSet | Sequence[Prepared], *, batch_tokens: int, advance: Callable[[int], None]
) -> Responses:
    """The nll (nats, float64 sums of float32 terms) and bytes of every response."""
    device = device_of(model)
    found: Responses = {}
    lengths = np.array([len(conversation.input_ids) for conversation in conversations], dtype=np.int64)
    for indices in length_batches(lengths, batch_tokens):
        members = [conversations[index] for index in indices]
        batch = collate(members)
        gold = batch.input_ids[batch.rows[:, 0], batch.rows[:, 1]].to(device)
        nll = _nll(response_logits(model, batch.to(device)), gold)
        begin = 0
        for conversation in members:
            rows = nll[begin : begin + len(conversation)]
            begin += len(conversation)
            content = ~conversation.end_of_turn
            found[conversation.id] = [
                (float(rows[content & (conversation.response == index)].astype(np.float64).sum()), int(size))
                for index, size in enumerate(conversation.content_bytes)
            ]
        advance(len(members))
    return {conversation.id: found[conversation.id] for conversation in conversations}


def _nll(logits: torch.Tensor, gold: torch.Tensor) -> np.ndarray:
    """float32 [n]."""
    parts = [gold_nll(full, gold[rows], full.logsumexp(dim=1)) for rows, full in float_rows(logits)]
    return torch.cat(parts).cpu().numpy()


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
