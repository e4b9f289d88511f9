"""From vLLM's `prompt_logprobs` to sparse distributions, for both ways in which they come.

For a prompt of T tokens vLLM gives a list of T: None for the first token, and for token t the entries `{token id: (logprob,
rank)}` of the distribution that predicts it: its k most likely tokens, and the token of the prompt itself where it is not
among them. In this process an entry is an object with `logprob` and `rank`; a server sends JSON, ids as strings.

The probability of all other tokens is what these leave, summed in float64. Their own float32 rounding makes up to 1e-6 of
nothing, so that a smaller tail counts as none; the Transformers backend sums the others themselves.
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
_ROUNDING = 0.01  # by how much probabilities may sum to more than 1: bfloat16 engines exist


def sparse_distribution(
    conversation: Prepared, found: Sequence[Mapping[Any, Any] | None] | None, *, k: int, vocabulary: int, who: str
) -> SparseDistribution | None:
    """The `k` most likely tokens at each of the conversation's rows; None where a value is not finite.

    `vocabulary`: how many tokens the model knows. Raises ModelError, about `who`, for what is no answer to the question:
    other tokens than were asked about, fewer than `k`, something else than log-probabilities.
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
    """Raises DataError for conversations of more tokens than the model or the server takes: none is cut."""
    for conversation in conversations:
        tokens = len(conversation.input_ids)
        if tokens > takes:
            raise DataError(
                f"{who}: takes at most {takes} tokens, and conversation {conversation.id} has {tokens}; "
                f"{advice}set data.max_length: {takes}"
            )


def _entries(found: Mapping[Any, Any] | None) -> dict[int, tuple[float, float]]:
    """(log-probability, rank) of each token at one position; what is missing is NaN, or of the last rank."""
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
