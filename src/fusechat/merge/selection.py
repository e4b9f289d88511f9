"""The exact largest entries of a tensor by radix histograms: no sort, and no copy of the tensor.

A key is an int64 ≥ 0 that orders as what it stands for (the bits of a float that is not negative do). Every pass counts 16
further bits of the keys that may still be the smallest to be kept; what is left is gathered once it is little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusechat.merge.kernels import CHUNK, kernel
from fusechat.merge.tensor import Tensor, scratch

GATHER = 1 << 24  # keys that may be gathered at once, over all rows
ALL, NONE = -1, np.iinfo(np.int64).max  # thresholds that keep everything and nothing
_BITS, _BUCKETS = 16, 1 << 16
_SHIFTS = (47, 31, 15, -1)  # -1: the lowest 15 bits and a zero

Keys = Callable[[np.ndarray, int, np.ndarray], None]  # (block, row, out int64 [n])


@dataclass(frozen=True)
class Selection:
    """Of each row, keys above its threshold are kept, and of those equal to it the first `ties[row, chunk]` of every chunk.

    `thresholds` int64 [rows], `ties` int64 [rows, chunks], `counts` int64 [rows]: how many are kept.
    """

    thresholds: np.ndarray
    ties: np.ndarray
    counts: np.ndarray


def select(
    tensor: Tensor, keys: Keys, rows: int, keep: Callable[[np.ndarray], np.ndarray], *, gather: int = GATHER
) -> Selection:
    """The `keep(nonzero)` largest of each row's keys, ties to the lower flat index.

    `nonzero` and what `keep` returns are int64 [rows]: how many keys are not zero, and how many to keep.
    """
    histogram = _count(tensor, keys, np.zeros(rows, np.int64), 0)
    zeros = histogram[:, _BUCKETS]
    wanted = np.clip(keep(tensor.size - zeros), 0, tensor.size)
    search = _Search(rows, wanted)
    for level in range(len(_SHIFTS)):
        if level:
            histogram = _count(tensor, keys, search.prefixes, level)
        search.narrow(histogram[:, :_BUCKETS], level)
        if search.inside[search.open].sum() <= gather:
            break
    ties = np.zeros((rows, tensor.chunks), np.int64)
    if search.open.any():
        _settle(tensor, keys, search, level, ties)
    return Selection(search.thresholds, ties, wanted)


class _Search:
    """Where the smallest key to be kept lies, row by row: all keys that begin with `prefixes` are still in question.

    Of the `inside` keys there, the `missing` largest are kept. A row that is settled has a threshold and is not open.
    """

    def __init__(self, rows: int, wanted: np.ndarray) -> None:
        self.prefixes = np.zeros(rows, np.int64)
        self.missing = wanted.copy()
        self.inside = np.zeros(rows, np.int64)
        self.thresholds = np.where(wanted > 0, ALL, NONE).astype(np.int64)
        self.open = wanted > 0

    def narrow(self, histogram: np.ndarray, level: int) -> None:
        for row in np.flatnonzero(self.open):
            above = np.cumsum(histogram[row][::-1])[::-1]  # keys in this bucket and above it
            bucket = int(np.flatnonzero(above >= self.missing[row])[-1])
            self.inside[row] = histogram[row, bucket]
            self.missing[row] -= above[bucket] - self.inside[row]
            self.prefixes[row] = self.prefixes[row] << _BITS | bucket
            if self.missing[row] == self.inside[row]:  # the whole bucket is kept
                self.thresholds[row] = _lowest(self.prefixes[row], level) - 1
                self.open[row] = False


def _lowest(prefix: int, level: int) -> int:
    shift = _SHIFTS[level]
    return int(prefix) << shift if shift >= 0 else int(prefix) >> 1


def _count(tensor: Tensor, keys: Keys, prefixes: np.ndarray, level: int) -> np.ndarray:
    """int64 [rows, 65,537]: of the keys that begin with a row's prefix, how many have which next 16 bits; last, zeros."""
    rows = len(prefixes)

    def work(start: int, block: np.ndarray, histogram: np.ndarray) -> None:
        out = scratch("keys", (block.shape[1],), np.int64)
        for row in range(rows):
            keys(block, row, out)
            _histogram(out, prefixes[row], level, histogram[row])

    _, parts = tensor.blocks_with(work, lambda: np.zeros((rows, _BUCKETS + 1), np.int64))
    total: np.ndarray = np.sum(parts, axis=0)
    return total


def _settle(tensor: Tensor, keys: Keys, search: _Search, level: int, ties: np.ndarray) -> None:
    """Sets threshold and ties of the open rows from their keys in question, gathered, or all equal at the last level."""
    rows = np.flatnonzero(search.open)
    exact = level == len(_SHIFTS) - 1

    def work(start: int, block: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        out = scratch("keys", (block.shape[1],), np.int64)
        found = []
        for row in rows:
            keys(block, int(row), out)
            places = _places(out, search.prefixes[row], level)
            chunks = (start + places) // CHUNK
            if exact:
                chunks, counts = np.unique(chunks, return_counts=True)
                found.append((chunks, counts))
            else:
                found.append((chunks, out[places]))
        return found

    blocks = tensor.blocks(work)
    for number, row in enumerate(rows):
        chunks = np.concatenate([found[number][0] for found in blocks])
        values = np.concatenate([found[number][1] for found in blocks])
        missing = int(search.missing[row])
        if exact:
            threshold, equal = _lowest(search.prefixes[row], level), np.repeat(chunks, values)
        else:
            threshold = int(np.partition(values, values.size - missing)[values.size - missing])
            missing -= int(np.count_nonzero(values > threshold))
            equal = chunks[values == threshold]
        search.thresholds[row] = threshold
        np.add.at(ties[row], equal[:missing], 1)  # in flat order: the lower index first


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
    """What the key begins with, and its next 16 bits."""
    if level == 1:
        return key >> 47, (key >> 31) & 0xFFFF
    if level == 2:
        return key >> 31, (key >> 15) & 0xFFFF
    return key >> 15, (key << 1) & 0xFFFF


@kernel
def _places(keys, prefix, level):  # type: ignore[no-untyped-def]
    """Where the keys are that begin with the prefix, which has the bits of levels 0 to `level`."""
    shift = (47, 31, 15, 0)[level]
    if level == 3:
        prefix = prefix >> 1
    count = 0
    for i in range(keys.size):
        count += (keys[i] >> shift) == prefix
    places = np.empty(count, np.int64)
    count = 0
    for i in range(keys.size):
        if (keys[i] >> shift) == prefix:
            places[count] = i
            count += 1
    return places


@kernel
def kept(keys, threshold, ties, mask):  # type: ignore[no-untyped-def]
    """Writes to `mask` bool [n] which keys are kept; `ties` are those of the chunks that the keys are of."""
    for i in range(keys.size):
        mask[i] = keys[i] > threshold
    for chunk in range(ties.size):
        left = ties[chunk]
        i = chunk * CHUNK
        while left > 0:
            if keys[i] == threshold:
                mask[i] = True
                left -= 1
            i += 1
