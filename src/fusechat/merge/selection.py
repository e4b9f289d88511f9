"""The exact largest entries of a tensor, without sorting or copying it.

`bracket.py` finds a bracket around the smallest key to be kept; the few keys in it are gathered and ordered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusechat.merge.bracket import Bracket, Keep, Keys, counted, sampled
from fusechat.merge.kernels import CHUNK, kernel
from fusechat.merge.tensor import Tensor, scratch

GATHER = 1 << 22  # keys gathered at once, over all rows
SAMPLE = 64  # chunks sampled first; up to eight times as many of large tensors

Visit = Callable[[np.ndarray, np.ndarray, int, np.ndarray], Any]  # (block, keys, high, places in the bracket) of row 0


@dataclass(frozen=True)
class Selection:
    """In each row, keys above the threshold are kept, and of keys equal to it the first `ties[row, chunk]` of every chunk.

    `thresholds` int64 [rows], `ties` int64 [rows, chunks], `counts` int64 [rows] of kept keys. `visited`: the results of `visit`
    for each block, and bool, which gathered keys of row 0 are kept, in flat order; None without a visit.
    """

    thresholds: np.ndarray
    ties: np.ndarray
    counts: np.ndarray
    visited: tuple[list[Any], np.ndarray] | None = None


@dataclass(frozen=True)
class _Found:
    """The result of a pass: int64 [rows], keys that are zero and keys `above` the bracket; each row's keys in it with their
    chunks. For a bracket of a single key, `equal` int64 [rows, chunks] counts it instead."""

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
    """Selects the `keep(nonzero)` largest keys of each row; the lower flat index wins a tie. At most `gather` keys are held at
    once. `sample`: chunks to sample first, 0 for none; the default depends on the tensor's size."""
    if sample is None:
        sample = min(max(tensor.chunks // 64, SAMPLE), 8 * SAMPLE)
    if sample and tensor.chunks >= 8 * sample:
        bracket = sampled(tensor, keys, rows, keep, sample)
        found = _collect(tensor, keys, bracket, gather, visit)
        selection = _settle(tensor, bracket, found, keep(tensor.size - found.zeros)) if found else None
        if selection is not None:
            return selection
    bracket, wanted = counted(tensor, keys, rows, keep, gather)
    found = _collect(tensor, keys, bracket, rows * tensor.size, visit)
    selection = _settle(tensor, bracket, found, wanted) if found else None
    assert selection is not None, "a counted bracket holds what is looked for"
    return selection


def _collect(tensor: Tensor, keys: Keys, bracket: Bracket, gather: int, visit: Visit | None) -> _Found | None:
    """One pass over the tensor; None if more than `gather` keys are in the bracket."""
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
            if single[row]:
                counts[row, :2] = _compare(out, bracket.high[row], equal[row])
            else:
                counts[row] = _between(out, bracket.low[row], bracket.high[row], places)
            inside = places[: counts[row, 2]]
            held[0] += inside.size  # by all threads, not exact: a limit of memory
            if held[0] <= gather:
                gathered.append(_taken(out, inside, start))
                if visit and not single[row]:
                    visited = visit(block, out, int(bracket.high[row]), inside)
        return counts, gathered, equal, visited

    blocks = tensor.blocks(work)
    if sum(int(block[0][:, 2].sum()) for block in blocks) > gather:
        return None
    counts = np.sum([np.zeros((rows, 3), np.int64), *(block[0] for block in blocks)], axis=0)

    def joined(row: int, part: int) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(block[1][row][part] for block in blocks)])

    values, chunks = ([joined(row, part) for row in range(rows)] for part in (0, 1))
    equal = np.concatenate([np.zeros((rows, 0), np.int64), *(block[2] for block in blocks)], axis=1)
    return _Found(counts[:, 0], counts[:, 1], values, chunks, equal, [block[3] for block in blocks])


def _settle(tensor: Tensor, bracket: Bracket, found: _Found, wanted: np.ndarray) -> Selection | None:
    """Thresholds and ties of all rows; None if the smallest key to be kept is outside a row's bracket."""
    wanted = np.clip(wanted, 0, tensor.size)
    thresholds, ties = bracket.high.copy(), np.zeros((len(wanted), tensor.chunks), np.int64)
    kept_here = np.zeros(found.keys[0].size, np.bool_)
    single = bracket.low == bracket.high
    inside = np.where(single, found.equal.sum(axis=1), [values.size for values in found.keys])
    if ((wanted < found.above) | (wanted > found.above + inside)).any():
        return None

    def settle(row: int, _: None) -> None:
        missing = int(wanted[row] - found.above[row])
        if missing and single[row]:
            before = np.cumsum(found.equal[row]) - found.equal[row]
            ties[row] = np.clip(missing - before, 0, found.equal[row])
        elif missing:
            values = found.keys[row]
            thresholds[row] = np.partition(values, values.size - missing)[values.size - missing]
            larger = values > thresholds[row]
            equal = np.flatnonzero(values == thresholds[row])[: missing - np.count_nonzero(larger)]  # in flat order
            ties[row] = np.bincount(found.chunks[row][equal], minlength=tensor.chunks)
            if row == 0:
                kept_here[:] = larger
                kept_here[equal] = True

    tensor.workers.run(settle, len(wanted), lambda: None)
    visited = (found.visits, kept_here) if not single[0] else None
    return Selection(thresholds, ties, wanted, visited)


@kernel
def _between(keys, low, high, places):  # type: ignore[no-untyped-def]
    """(zeros, keys above `high`, keys in between), and the places of the last; `places` needs one extra element."""
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
def _compare(keys, key, equal):  # type: ignore[no-untyped-def]
    """(zeros, keys above `key`); adds to `equal` int64 [chunks] how many equal it."""
    zeros = 0
    above = 0
    for chunk in range(equal.size):
        part = keys[chunk * CHUNK : (chunk + 1) * CHUNK]
        for i in range(part.size):
            zeros += part[i] == 0
            above += part[i] > key
            equal[chunk] += part[i] == key
    return zeros, above


@kernel
def _taken(keys, places, start):  # type: ignore[no-untyped-def]
    """The keys at these places of a block, and their chunks of the tensor."""
    values, chunks = np.empty(places.size, np.int64), np.empty(places.size, np.int64)
    for i in range(places.size):
        values[i] = keys[places[i]]
        chunks[i] = (start + places[i]) // CHUNK
    return values, chunks


@kernel
def kept(keys, threshold, ties, mask):  # type: ignore[no-untyped-def]
    """Writes to `mask` bool [n] which keys are kept; `ties` are those of the keys' chunks."""
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
