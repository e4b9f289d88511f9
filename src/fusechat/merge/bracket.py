"""Brackets the smallest key to be kept, from a sample or from radix histograms.

A key is an int64 ≥ 0 in the order of what it stands for, such as the bits of a non-negative float.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusechat.merge.kernels import CHUNK, kernel
from fusechat.merge.tensor import Tensor, scratch

ALL, NONE = -1, np.iinfo(np.int64).max  # thresholds that keep everything and nothing
_BITS, _BUCKETS = 16, 1 << 16
_SHIFTS = (47, 31, 15, -1)  # of the levels; -1: the lowest 15 bits and a zero

Keys = Callable[[np.ndarray, int, np.ndarray], None]  # (block, row, out int64 [n])
Keep = Callable[[np.ndarray], np.ndarray]  # int64 [rows] nonzero keys → int64 [rows] keys to be kept


@dataclass(frozen=True)
class Bracket:
    """int64 [rows] each: keys above `high` are kept, keys below `low` are not, those between are undecided."""

    low: np.ndarray
    high: np.ndarray


def sampled(tensor: Tensor, keys: Keys, rows: int, keep: Keep, sample: int) -> Bracket:
    """A bracket of six standard errors each way, from `sample` chunks spread evenly over the tensor."""
    found = np.empty((rows, sample, CHUNK), np.int64)

    def look(number: int, _: None) -> None:
        block = tensor.read(number * (tensor.chunks - 1) // sample * CHUNK, CHUNK)
        for row in range(rows):
            keys(block, row, found[row, number])

    tensor.workers.run(look, sample, lambda: None)
    size = sample * CHUNK
    scale = tensor.size / size
    nonzero = np.round(np.count_nonzero(found, axis=(1, 2)) * scale).astype(np.int64)
    ranks = np.clip(keep(nonzero), 0, tensor.size) / scale
    low, high = np.zeros(rows, np.int64), np.full(rows, NONE)

    def bound(row: int, _: None) -> None:
        rank, seen = ranks[row], found[row].reshape(-1)
        at = size - 1 - min(int(rank), size - 1)
        likely = np.partition(seen, at)[at]
        spread = np.count_nonzero(found[row] >= likely, axis=1).std()  # chunks differ: their counts tell how much
        margin = 6 * np.sqrt(sample) * spread + 8
        lowest, highest = size - 1 - int(rank + margin), size - 1 - int(rank - margin)
        ordered = np.partition(seen, [max(lowest, 0), min(highest, size - 1)])
        high[row] = ordered[highest] if highest < size else NONE
        low[row] = ordered[lowest] if lowest >= 0 else 0

    tensor.workers.run(bound, rows, lambda: None)
    return Bracket(low, high)


def counted(tensor: Tensor, keys: Keys, rows: int, keep: Keep, gather: int) -> tuple[Bracket, np.ndarray]:
    """The bracket from histograms, with at most `gather` keys or a single one; and int64 [rows], how many keys to keep."""
    histogram = _count(tensor, keys, np.zeros(rows, np.int64), 0)
    wanted = np.clip(keep(tensor.size - histogram[:, _BUCKETS]), 0, tensor.size)
    prefixes, missing, inside = np.zeros(rows, np.int64), wanted.copy(), np.zeros(rows, np.int64)
    bounds = np.where(wanted > 0, ALL, NONE)
    bracket = Bracket(bounds, bounds.copy())
    open_rows = np.flatnonzero(wanted > 0)
    for level in range(len(_SHIFTS)):
        if level:
            histogram = _count(tensor, keys, prefixes, level)
        for row in open_rows:
            above = np.cumsum(histogram[row, :_BUCKETS][::-1])[::-1]  # keys in this bucket and those above
            bucket = int(np.flatnonzero(above >= missing[row])[-1])
            inside[row] = histogram[row, bucket]
            missing[row] -= above[bucket] - inside[row]
            prefixes[row] = prefixes[row] << _BITS | bucket
            bracket.low[row], bracket.high[row] = _lowest(prefixes[row], level), _lowest(prefixes[row] + 1, level) - 1
        whole = open_rows[missing[open_rows] == inside[open_rows]]  # the whole bucket is kept
        bracket.high[whole] = bracket.low[whole] = bracket.low[whole] - 1
        open_rows = open_rows[missing[open_rows] < inside[open_rows]]
        if inside[open_rows].sum() <= gather:
            break
    return bracket, wanted


def _lowest(prefix: int, level: int) -> int:
    """The smallest key with a prefix. At the last level prefixes end in a zero, and may overflow into the sign."""
    shift = _SHIFTS[level]
    return min(int(prefix) << shift if shift >= 0 else (int(prefix) % (1 << 64) + 1) >> 1, int(NONE))


def _count(tensor: Tensor, keys: Keys, prefixes: np.ndarray, level: int) -> np.ndarray:
    """int64 [rows, 65,537]: a histogram of the next 16 bits of the keys with each row's prefix; the last column counts zeros."""
    rows = len(prefixes)

    def work(start: int, block: np.ndarray, histogram: np.ndarray) -> None:
        out = scratch("keys", (block.shape[1],), np.int64)
        for row in range(rows):
            keys(block, row, out)
            _histogram(out, prefixes[row], level, histogram[row])

    _, parts = tensor.blocks_with(work, lambda: np.zeros((rows, _BUCKETS + 1), np.int64))
    total: np.ndarray = np.sum([np.zeros((rows, _BUCKETS + 1), np.int64), *parts], axis=0)
    return total


@kernel
def _histogram(keys, prefix, level, histogram):  # type: ignore[no-untyped-def]
    if level == 0:
        zeros = 0
        for i in range(keys.size):
            histogram[keys[i] >> 47] += 1
            zeros += keys[i] == 0
        histogram[_BUCKETS] += zeros
        return
    for i in range(keys.size):
        begin, bucket = _split(keys[i], level)
        if begin == prefix:
            histogram[bucket] += 1


@kernel
def _split(key, level):  # type: ignore[no-untyped-def]
    """The key's prefix, and its next 16 bits."""
    if level == 1:
        return key >> 47, (key >> 31) & 0xFFFF
    if level == 2:
        return key >> 31, (key >> 15) & 0xFFFF
    return key >> 15, (key << 1) & 0xFFFF
