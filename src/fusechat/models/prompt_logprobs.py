"""Turns vLLM's `prompt_logprobs` into sparse distributions, in this process and from a server.

For a prompt of T tokens vLLM returns a list of T: None for the first token, and for token t the entries `{token id: (logprob,
rank)}` of the distribution that predicts it: its k most probable tokens, and the prompt's token if it is not among them. In this
process an entry is an object with `logprob` and `rank`; a server sends JSON with ids as strings.

The tail is 1 minus their float64 sum. Their float32 rounding gives up to 1e-6, so that a smaller tail counts as 0; the
Transformers backend sums the other tokens itself.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.errors import DataError, ModelError

_SERVER_MINUS_INFINITY = -9999.0  # JSON has no -inf; vLLM's server writes this for it
_NO_TAIL = 1e-6
_ROUNDING = 0.01  # how far above 1 probabilities may sum, for bfloat16 engines


def sparse_distribution(
    conversation: Prepared, found: Sequence[Mapping[Any, Any] | None] | None, *, k: int, vocabulary: int, who: str
) -> SparseDistribution | None:
    """The `k` most probable tokens at each of the conversation's rows; None if a value is not finite.

    `vocabulary`: the model's size. Raises ModelError, naming `who`, for an invalid reply: other tokens than the prompt's, fewer
    than `k`, or values that are no log-probabilities.
    """
    tokens = len(conversation.input_ids)
    if found is None or len(found) != tokens:
        given = "none" if found is None else f"those of {len(found)}"
        raise ModelError(f"{who}: asked for prompt_logprobs of {tokens} tokens, it gave {given}; is it vLLM?")
    n = len(conversation)
    ids, logprobs, nll = np.full((n, k), -1, np.int32), np.empty((n, k), np.float32), np.empty(n, np.float32)
    for row, (position, gold) in enumerate(
        zip(conversation.position.tolist(), conversation.gold.tolist(), strict=True)
    ):
        entries = _entries(found[position])
        if gold not in entries and len(entries) >= k:
            raise ModelError(f"{who}: left out a token that it was asked about")
        if len(entries) < k:
            raise ModelError(
                f"{who}: gave {len(entries)} tokens at a position where the {k} most likely were asked for"
            )
        likeliest = sorted(entries, key=lambda token: (entries[token][1], -entries[token][0]))[:k]
        ids[row] = likeliest
        logprobs[row] = [entries[token][0] for token in likeliest]
        nll[row] = -entries[gold][0]
    if not (np.isfinite(nll).all() and np.isfinite(logprobs).all()):
        return None
    if n and ids.max() >= vocabulary:
        raise ModelError(f"{who}: gave token {ids.max()}, but the model knows only {vocabulary}; is it another model?")
    tail = 1.0 - np.exp(logprobs.astype(np.float64)).sum(axis=1)
    if (tail < -_ROUNDING).any():
        raise ModelError(f"{who}: gives logits instead of log-probabilities; set its --logprobs-mode raw_logprobs")
    return SparseDistribution(ids, logprobs, nll, np.where(tail < _NO_TAIL, 0.0, tail).astype(np.float32))


def refuse_long(conversations: Sequence[Prepared], takes: int, who: str, advice: str = "") -> None:
    """Raises DataError for conversations with more tokens than the model or server takes. None is truncated."""
    for conversation in conversations:
        tokens = len(conversation.input_ids)
        if tokens > takes:
            raise DataError(
                f"{who}: takes at most {takes} tokens, and conversation {conversation.id} has {tokens}; "
                f"{advice}set data.max_length: {takes}"
            )


def _entries(found: Mapping[Any, Any] | None) -> dict[int, tuple[float, float]]:
    """(log-probability, rank) of each token at a position; NaN, or the last rank, if missing."""
    entries = {}
    for token, entry in (found or {}).items():
        logprob, rank = (
            (entry.get("logprob"), entry.get("rank")) if isinstance(entry, Mapping) else (entry.logprob, entry.rank)
        )
        if logprob is None:
            logprob = math.nan
        elif logprob <= _SERVER_MINUS_INFINITY:
            logprob = -math.inf
        entries[int(token)] = logprob, math.inf if rank is None else rank
    return entries
