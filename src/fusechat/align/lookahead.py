"""Looks one source token ahead, where a pivot token may be longer than the source token it starts with.

There, W has only the average of what follows over the training set. But for the actual text the source's distribution after its
own token was captured: each of its next candidates, with its own probability, gives the bytes that follow, and more bytes
determine the pivot's token better than one source token does.
"""

from dataclasses import dataclass

import numpy as np

from fusechat.align.candidates import NONE, Candidates
from fusechat.align.counts import Counts
from fusechat.align.sequence import Alignment
from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.models.token_bytes import TokenBytes

MIN_EXTENDED_SHARE = (
    0.01  # a source token is open if this share of its counts is with longer pivot tokens, or it has none
)
MIN_CONTINUATION = 0.01  # less probable continuations use W


def extendable_tokens(counts: Counts, pivot: TokenBytes, source: TokenBytes) -> np.ndarray:
    """bool [source tokens]: tokens that a longer pivot token often starts with, and tokens without counts."""
    own, other = _lengths(source, counts.source), _lengths(pivot, counts.pivot)
    size = max(len(source), int(counts.source.max(initial=-1)) + 1)
    longer = np.bincount(counts.source, weights=counts.count * (other > own), minlength=size)
    total = np.bincount(counts.source, weights=counts.count, minlength=size)
    return (longer >= MIN_EXTENDED_SHARE * total) & ((longer > 0) | (total == 0))


def _lengths(tokens: TokenBytes, ids: np.ndarray) -> np.ndarray:
    return np.where(ids < len(tokens), tokens.lengths[np.minimum(ids, len(tokens) - 1)], 0)


@dataclass(frozen=True)
class Ahead:
    """Pivot rows at which to look ahead, int64 [b]; the source row, int64 [b], whose token each starts with or inside of; and
    the bytes of that token from there on."""

    pivot_row: np.ndarray
    source_row: np.ndarray
    rest: list[bytes]


def rows_ahead(
    alignment: Alignment, source: Prepared, is_open: np.ndarray, tokens: TokenBytes, *, inside: bool
) -> Ahead:
    """Rows where a pivot token starts with an open source token, or (`inside`) inside any, and the response continues after it."""
    first = np.where(alignment.inside, alignment.inside_row, alignment.source_row)
    gold = source.gold[first]
    after = np.append(source.response[1:] == source.response[:-1], False)[first] & ~source.end_of_turn[first]
    opened = np.where(gold < len(is_open), is_open[np.minimum(gold, len(is_open) - 1)], False)
    rows = np.flatnonzero((alignment.unclipped & opened | (alignment.inside & inside)) & after)
    given = alignment.given[rows].tolist()
    rest = [tokens[token][begin:] for token, begin in zip(gold[rows].tolist(), given, strict=True)]
    return Ahead(rows, first[rows], rest)


def next_candidates(ahead: Ahead, captured: SparseDistribution) -> tuple[np.ndarray, np.ndarray]:
    """The source's predictions after its own token: ids [b, k], -1 for none or improbable ones, and probabilities, float64."""
    rows = captured.take(ahead.source_row + 1)
    share = rows.probabilities
    return np.where(share >= MIN_CONTINUATION, rows.ids, NONE), np.where(share >= MIN_CONTINUATION, share, 0.0)


def bytes_ahead(ahead: Ahead, candidates: np.ndarray, tokens: TokenBytes) -> tuple[list[bytes], np.ndarray]:
    """The distinct byte strings up to the end of each next candidate, and the index of each candidate's, int64 [b, c], or -1.
    `candidates` int [b, c], -1 pads, of the source rows after. A special token adds no bytes."""
    number: dict[bytes, int] = {}
    rest = np.array([number.setdefault(data, len(number)) for data in ahead.rest], dtype=np.int64)
    remaining_bytes = list(number)
    keys = np.where(candidates >= 0, (rest[:, None] << 32) | candidates, NONE)
    different, which = np.unique(keys, return_inverse=True)
    lacking = int(len(different) > 0 and different[0] < 0)
    at, token = (different >> 32)[lacking:].tolist(), (different & 0xFFFFFFFF)[lacking:].tolist()
    spelt = {each: b"" if each in tokens.special else tokens[each] for each in set(token)}
    data = [remaining_bytes[index] + spelt[each] for index, each in zip(at, token, strict=True)]
    return data, which.reshape(candidates.shape) - lacking


def with_ahead(
    candidates: Candidates,
    ahead: Ahead,
    source: Prepared,
    captured: SparseDistribution,
    vocabulary_map: VocabularyMap,
    tokens: TokenBytes,
) -> Candidates:
    """Distributes the mass of the source's own token over its probable continuations. The rest of the mass stays."""
    n, k = len(candidates.row), captured.ids.shape[1]
    own = _own_column(candidates, ahead, source, captured)
    use = np.flatnonzero((own >= 0) & np.isnan(candidates.chained[ahead.pivot_row]))
    ahead = Ahead(ahead.pivot_row[use], ahead.source_row[use], [ahead.rest[at] for at in use.tolist()])
    row = np.concatenate([np.full((n, k), NONE, dtype=np.int64), candidates.row], axis=1)
    mass = np.concatenate([np.zeros((n, k)), candidates.mass], axis=1)
    column = own[use] + k
    next_ids, share = next_candidates(ahead, captured)
    known = vocabulary_map.row_of_remainder
    different, which = bytes_ahead(ahead, next_ids, tokens)
    found = np.array([known[data] if data else NONE for data in different] + [NONE], dtype=np.int64)
    whole = mass[ahead.pivot_row, column]
    row[ahead.pivot_row, :k] = found[which]
    mass[ahead.pivot_row, :k] = whole[:, None] * share
    mass[ahead.pivot_row, column] = whole * np.clip(1.0 - share.sum(axis=1), 0.0, 1.0)
    return Candidates(row, mass, candidates.own, candidates.chained)


def _own_column(candidates: Candidates, ahead: Ahead, source: Prepared, captured: SparseDistribution) -> np.ndarray:
    """int64 [b]: the column of the source's own token among the candidates, or -1."""
    k = captured.ids.shape[1]
    same = captured.ids[ahead.source_row] == source.gold[ahead.source_row][:, None]
    same &= candidates.row[ahead.pivot_row, :k] >= 0
    column = np.where(same.any(axis=1), same.argmax(axis=1), NONE)
    last = candidates.own[ahead.pivot_row] & (candidates.row.shape[1] > k)
    return np.where(last, candidates.row.shape[1] - 1, column)
