"""Counts of token pairs that start at the same byte, over a training set (arXiv 2408.07990, section 3.3)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

_ROOM = 1 << 22  # keys collected before they are counted


@dataclass(frozen=True)
class Counts:
    """Pairs of tokens with shared starts: `source`, `pivot` int64 [p], sorted and distinct; `count` int64 [p]."""

    source: np.ndarray
    pivot: np.ndarray
    count: np.ndarray


def count_pairs(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Counts:
    """Counts (source ids, pivot ids) of aligned positions, int [n] each. The order does not matter."""
    keys, count = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    waiting: list[np.ndarray] = []
    size = 0
    for source, pivot in pairs:
        waiting.append((source.astype(np.int64) << 32) | pivot)
        size += len(source)
        if size > _ROOM:
            keys, count = _fold(keys, count, waiting)
            waiting, size = [], 0
    keys, count = _fold(keys, count, waiting)
    return Counts(source=keys >> 32, pivot=keys & 0xFFFFFFFF, count=count)


def add_counts(parts: Iterable[Counts]) -> Counts:
    """The sum of several counts. The order does not matter."""
    parts = list(parts)
    keys = np.concatenate([np.zeros(0, dtype=np.int64), *((part.source << 32) | part.pivot for part in parts)])
    weights = np.concatenate([np.zeros(0, dtype=np.int64), *(part.count for part in parts)])
    keys, count = _summed(keys, weights)
    return Counts(source=keys >> 32, pivot=keys & 0xFFFFFFFF, count=count)


def _fold(keys: np.ndarray, count: np.ndarray, waiting: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Adds the `waiting` keys to sorted keys and their counts."""
    new = np.concatenate([np.zeros(0, dtype=np.int64), *waiting])
    new.sort()
    first = np.flatnonzero(np.append(True, new[1:] != new[:-1])) if len(new) else np.zeros(0, dtype=np.int64)
    times = np.diff(np.append(first, len(new)))
    if not len(keys):
        return new[first], times
    return _summed(np.concatenate([keys, new[first]]), np.concatenate([count, times]))


def _summed(keys: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, where = np.unique(keys, return_inverse=True)
    total = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(total, where, weights)
    return distinct, total


@dataclass
class Seen:
    """What the map needs to know of conversations.

    `pairs`: counts of tokens with shared starts. `parts`: how often a pivot token started where these bytes of the source
    followed, up to the end of a source token. `tokens`: int64, the source tokens in captured distributions. `remaining_bytes`:
    bytes of candidates that are not whole source tokens.
    """

    pairs: Counts = field(default_factory=lambda: count_pairs([]))
    parts: Counter[tuple[bytes, int]] = field(default_factory=Counter)
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    remaining_bytes: set[bytes] = field(default_factory=set)


def add_seen(parts: Iterable[Seen]) -> Seen:
    """The sum of several parts of a training set. The order does not matter."""
    parts = list(parts)
    total: Counter[tuple[bytes, int]] = Counter()
    for part in parts:
        total.update(part.parts)
    return Seen(
        pairs=add_counts(part.pairs for part in parts),
        parts=total,
        tokens=np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(part.tokens for part in parts)])),
        remaining_bytes=set().union(*(part.remaining_bytes for part in parts)),
    )
