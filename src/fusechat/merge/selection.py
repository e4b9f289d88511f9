"""The exact largest entries of a tensor: no sort, and no copy of the tensor.

A key is an int64 ≥ 0 that orders as what it stands for (the bits of a float that is not negative do). First a bracket is found
that the smallest key to be kept lies in: from a sample, or where that fails from radix histograms, each pass over the tensor
counting 16 further bits of the keys that are still in question. Then the few keys in the bracket are gathered and settled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusechat.merge.kernels import CHUNK, kernel
from fusechat.merge.tensor import Tensor, scratch

GATHER = 1 << 22  # keys that may be gathered at once, over all rows
SAMPLE = 64  # chunks that are looked at first, and up to eight times as many of large tensors
ALL, NONE = -1, np.iinfo(np.int64).max  # thresholds that keep everything and nothing
_BITS, _BUCKETS = 16, 1 << 16
_SHIFTS = (47, 31, 15, -1)  # of the levels; -1: the lowest 15 bits and a zero

Keys = Callable[[np.ndarray, int, np.ndarray], None]  # (block, row, out int64 [n])
Keep = Callable[[np.ndarray], np.ndarray]  # int64 [rows] nonzero keys → int64 [rows] keys to be kept


Visit = Callable[[np.ndarray, np.ndarray, int, np.ndarray], Any]  # (block, keys, high, places in the bracket) of row 0


@dataclass(frozen=True)
class Selection:
    """Of each row, keys above its threshold are kept, and of those equal to it the first `ties[row, chunk]` of every chunk.

    `thresholds` int64 [rows], `ties` int64 [rows, chunks], `counts` int64 [rows]: how many are kept. `visited`: what was seen on
    the way, block by block, and which of the gathered keys of row 0 are kept, bool in flat order; None where it was not seen.
    """

    thresholds: np.ndarray
    ties: np.ndarray
    counts: np.ndarray
    visited: tuple[list[Any], np.ndarray] | None = None


@dataclass(frozen=True)
class Bracket:
    """Keys above `high` are kept, keys below `low` are not, those between are in question; int64 [rows] each."""

    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class _Found:
    """What a pass finds: int64 [rows] keys that are zero and `above` a bracket; each row's keys in it, with their chunks.

    Of a bracket that is one key, `equal` int64 [rows, chunks] counts them instead.
    """

    zeros: np.ndarray
    above: np.ndarray
    keys: list[np.ndarray]
    chunks: list[np.ndarray]
    equal: np.ndarray
    visits: list[Any]


def select(
    tensor: Tensor,
    keys: Keys,
    rows: int,
    keep: Keep,
    *,
    visit: Visit | None = None,
    gather: int = GATHER,
    sample: int | None = None,
) -> Selection:
    """The `keep(nonzero)` largest of each row's keys, ties to the lower flat index.

    At most `gather` keys are held at once. `sample` chunks are looked at first, 0 for none; by default what the tensor is worth.
    """
    if sample is None:
        sample = min(max(tensor.chunks // 64, SAMPLE), 8 * SAMPLE)
    if sample and tensor.chunks >= 8 * sample:
        bracket = _sampled(tensor, keys, rows, keep, sample)
        found = _collect(tensor, keys, bracket, gather, visit)
        selection = _settle(tensor, bracket, found, keep(tensor.size - found.zeros)) if found else None
        if selection is not None:
            return selection
    bracket, wanted = _counted(tensor, keys, rows, keep, gather)
    found = _collect(tensor, keys, bracket, rows * tensor.size, visit)
    selection = _settle(tensor, bracket, found, wanted) if found else None
    assert selection is not None, "a counted bracket holds what is looked for"
    return selection


def _sampled(tensor: Tensor, keys: Keys, rows: int, keep: Keep, sample: int) -> Bracket:
    """A bracket of six standard errors each way, from chunks spread evenly over the tensor."""
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
    for row, rank in enumerate(ranks):
        ordered = np.sort(found[row], axis=None)[::-1]
        likely = ordered[min(int(rank), size - 1)]
        spread = np.count_nonzero(found[row] >= likely, axis=1).std()  # chunks differ: their counts tell how much
        margin = 6 * np.sqrt(sample) * spread + 8
        first, last = int(rank - margin), int(rank + margin)
        high[row] = ordered[first] if first >= 0 else NONE
        low[row] = ordered[last] if last < size else 0
    return Bracket(low, high)


def _counted(tensor: Tensor, keys: Keys, rows: int, keep: Keep, gather: int) -> tuple[Bracket, np.ndarray]:
    """The bracket from histograms, narrow enough for its keys to be gathered, or one key wide; how many are to be kept."""
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
    """The smallest key from a prefix on; at the last level prefixes end in a zero, and may have run into the sign."""
    shift = _SHIFTS[level]
    return min(int(prefix) << shift if shift >= 0 else (int(prefix) % (1 << 64) + 1) >> 1, int(NONE))


def _count(tensor: Tensor, keys: Keys, prefixes: np.ndarray, level: int) -> np.ndarray:
    """int64 [rows, 65,537]: of the keys that begin with a row's prefix, how many have which next 16 bits; last, zeros."""
    rows = len(prefixes)

    def work(start: int, block: np.ndarray, histogram: np.ndarray) -> None:
        out = scratch("keys", (block.shape[1],), np.int64)
        for row in range(rows):
            keys(block, row, out)
            _histogram(out, prefixes[row], level, histogram[row])

    _, parts = tensor.blocks_with(work, lambda: np.zeros((rows, _BUCKETS + 1), np.int64))
    total: np.ndarray = np.sum([np.zeros((rows, _BUCKETS + 1), np.int64), *parts], axis=0)
    return total


def _collect(tensor: Tensor, keys: Keys, bracket: Bracket, gather: int, visit: Visit | None) -> _Found | None:
    """One pass over the tensor; None where more than `gather` keys are in the bracket."""
    rows = len(bracket.low)
    single = bracket.low == bracket.high
    held = [0]

    def work(start: int, block: np.ndarray) -> tuple[Any, ...]:
        n = block.shape[1]
        out, places = scratch("keys", (n,), np.int64), scratch("places", (n + 1,), np.int64)
        counts, gathered, visited = np.zeros((rows, 3), np.int64), [], None
        equal = np.zeros((rows, -(-n // CHUNK)), np.int64)
        for row in range(rows):
            keys(block, row, out)
            counts[row] = _between(out, bracket.low[row], bracket.high[row], places)
            inside = places[: counts[row, 2]]
            if single[row]:
                equal[row] = np.bincount(inside // CHUNK, minlength=equal.shape[1])
                inside = inside[:0]
            held[0] += inside.size  # by all threads, and not to the last one: a limit of memory
            if held[0] <= gather:
                gathered.append((out[inside], (start + inside) // CHUNK))
                if visit and not single[row]:
                    visited = visit(block, out, int(bracket.high[row]), inside)
        return counts, gathered, equal, visited

    blocks = tensor.blocks(work)
    if sum(int(block[0][~single, 2].sum()) for block in blocks) > gather:
        return None
    counts = np.sum([np.zeros((rows, 3), np.int64), *(block[0] for block in blocks)], axis=0)

    def joined(row: int, part: int) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(block[1][row][part] for block in blocks)])

    values, chunks = ([joined(row, part) for row in range(rows)] for part in (0, 1))
    equal = np.concatenate([np.zeros((rows, 0), np.int64), *(block[2] for block in blocks)], axis=1)
    return _Found(counts[:, 0], counts[:, 1], values, chunks, equal, [block[3] for block in blocks])


def _settle(tensor: Tensor, bracket: Bracket, found: _Found, wanted: np.ndarray) -> Selection | None:
    """Thresholds and ties of all rows; None where the smallest key to be kept is not in a row's bracket."""
    wanted = np.clip(wanted, 0, tensor.size)
    thresholds, ties = bracket.high.copy(), np.zeros((len(wanted), tensor.chunks), np.int64)
    kept_here = np.zeros(found.keys[0].size, np.bool_)
    for row, missing in enumerate(wanted - found.above):
        single = bracket.low[row] == bracket.high[row]
        if missing < 0 or missing > (found.equal[row].sum() if single else found.keys[row].size):
            return None
        if missing and single:
            before = np.cumsum(found.equal[row]) - found.equal[row]
            ties[row] = np.clip(missing - before, 0, found.equal[row])
        elif missing:
            values = found.keys[row]
            thresholds[row] = np.partition(values, values.size - missing)[values.size - missing]
            larger = values > thresholds[row]
            equal = np.flatnonzero(values == thresholds[row])[: missing - np.count_nonzero(larger)]  # in flat order
            np.add.at(ties[row], found.chunks[row][equal], 1)
            if row == 0:
                kept_here |= larger
                kept_here[equal] = True
    visited = (found.visits, kept_here) if bracket.low[0] != bracket.high[0] else None
    return Selection(thresholds, ties, wanted, visited)


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
def _between(keys, low, high, places):  # type: ignore[no-untyped-def]
    """(how many are zero, how many are above `high`, how many lie between), with the places of the last; room for one more."""
    zeros = 0
    above = 0
    count = 0
    inside = np.empty(512, np.bool_)
    for start in range(0, keys.size, 512):
        part = keys[start : start + 512]
        here = 0
        for i in range(part.size):
            zeros += part[i] == 0
            above += part[i] > high
            inside[i] = (part[i] >= low) & (part[i] <= high)
            here += inside[i]
        if here:
            for i in range(part.size):
                places[count] = start + i
                count += inside[i]
    return zeros, above, count


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
