"""SCE: select, calculate, erase (arXiv 2408.07990, Algorithm 1, equations 5 to 9).

Select keeps the share `select_topk` of the positions where updates differ, those with the highest population variance (ties:
lower flat index). Calculate gives each target its share in the kept squared updates as coefficient. Erase zeroes, at each
position, updates whose sign is not that of their sum; the rest is averaged by coefficient. With `select_deltas: false` Select
applies to the coefficients only, as in the paper's repository. With `normalize: false` the average is not divided by the
remaining coefficients, as equation 9 is printed. Variance and sign are computed in float64, which is exact for most updates.
"""

from dataclasses import replace

import numpy as np

from fusechat.merge.kernels import CHUNK, kernel
from fusechat.merge.parameters import SCOPES, Parameter, Values
from fusechat.merge.selection import Selection, kept, select
from fusechat.merge.stats import TensorStats, shares
from fusechat.merge.tensor import Tensor, scratch

PARAMETERS = (
    Parameter("select_topk", default=1.0, low=0),
    Parameter("select_deltas", kind=bool, default=True),
    Parameter("normalize", kind=bool, default=True),
)
BASE = True
GRANULARITIES = SCOPES
TARGETS = None
TILE = 1024  # positions that fit the core's L1 cache


def measure(tensor: Tensor, values: Values) -> TensorStats:
    """Selects positions (equation 6) and computes the coefficients (equation 7)."""
    selection = None
    if values["select_topk"] < 1 and len(tensor.inputs) > 2:

        def keep(nonzero: np.ndarray) -> np.ndarray:
            return np.array([int(values["select_topk"] * count) for count in nonzero], np.int64)

        selection = select(tensor, _keys, 1, keep, visit=_visit)
        if selection.visited is not None:
            visits, chosen = selection.visited
            above = np.concatenate([sums for sums, _ in visits], axis=1).sum(axis=1)
            squares = above + [
                np.concatenate([inside[target] for _, inside in visits])[chosen].sum() for target in range(len(above))
            ]
            return TensorStats(shares(squares), squares, replace(selection, visited=None))

    def add(start: int, block: np.ndarray, sums: np.ndarray) -> None:
        _squares(block, _mask(block, start, selection), sums)

    squares = tensor.sums((len(tensor.inputs) - 1,), add)
    return TensorStats(shares(squares), squares, selection)


def _visit(block: np.ndarray, keys: np.ndarray, high: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared updates of a block whose keys are above the bracket, summed by chunk, and individually of those in it."""
    sums = np.zeros((block.shape[0] - 1, -(-block.shape[1] // CHUNK)))
    _squares(block, np.greater(keys, high, out=scratch("mask", keys.shape, np.bool_)), sums)
    return sums, _squares_at(block, places)


def combine(
    block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
) -> tuple[int, int, int]:
    """Erases updates (equation 8) and merges the rest (equation 9)."""
    mask = _mask(block, start, measured.selection if values["select_deltas"] else None)
    counts: tuple[int, int, int] = _merge(block, mask, measured.coefficients, values["normalize"], out)
    if len(block) == 2:  # base + (target - base) is the target, up to rounding
        out[:] = block[1]
    return counts


def _keys(block: np.ndarray, row: int, out: np.ndarray) -> None:
    variances(block, out.view(np.float64))


def _mask(block: np.ndarray, start: int, selection: Selection | None) -> np.ndarray:
    """bool [n], or empty if everything is kept."""
    if selection is None:
        return np.zeros(0, np.bool_)
    n = block.shape[1]
    keys, mask = scratch("keys", (n,), np.int64), scratch("mask", (n,), np.bool_)
    _keys(block, 0, keys)
    first = start // CHUNK
    kept(keys, selection.thresholds[0], selection.ties[0, first : first - (-n // CHUNK)], mask)
    return mask


@kernel
def variances(block, out):  # type: ignore[no-untyped-def]
    """float64 [n]: m² times the population variance of the m updates δ, from e = δ minus the first target's. m Σe² - (Σe)² is
    exactly zero where all updates are equal, and does not cancel where they are large and close."""
    targets = block.shape[0] - 1
    n = block.shape[1]
    sums = np.empty(TILE)
    for start in range(0, n, TILE):
        size = min(TILE, n - start)
        base, first = block[0, start : start + size], block[1, start : start + size]
        squares = out[start : start + size]
        sums[:] = 0.0
        squares[:] = 0.0
        for j in range(2, targets + 1):
            row = block[j, start : start + size]
            for i in range(size):
                apart = np.float64(row[i] - base[i]) - np.float64(first[i] - base[i])
                sums[i] += apart
                squares[i] += apart * apart
        for i in range(size):
            squares[i] = max(targets * squares[i] - sums[i] * sums[i], 0.0)


@kernel
def _chosen(mask, start, size, places):  # type: ignore[no-untyped-def]
    """Writes to `places` which of the `size` positions from `start` on are in the mask (all if it is empty); returns how many."""
    if mask.size == 0:
        for i in range(size):
            places[i] = i
        return size
    count = 0
    for i in range(size):
        places[count] = i
        count += mask[start + i]
    return count


@kernel
def _squares(block, mask, sums):  # type: ignore[no-untyped-def]
    """Adds to `sums` float64 [targets, chunks] the squared updates at the positions in `mask`."""
    lanes = np.empty(TILE)
    places = np.empty(TILE, np.int64)
    n = block.shape[1]
    for start in range(0, n, TILE):
        size = min(TILE, n - start)
        count = _chosen(mask, start, size, places)
        base = block[0, start : start + size]
        for j in range(1, block.shape[0]):
            row = block[j, start : start + size]
            if count == size:
                for i in range(size):
                    update = np.float64(row[i] - base[i])
                    lanes[i] = update * update
            else:
                for i in range(count):
                    update = np.float64(row[places[i]] - base[places[i]])
                    lanes[i] = update * update
            sums[j - 1, start // CHUNK] += _sum(lanes, count)


@kernel
def _squares_at(block, places):  # type: ignore[no-untyped-def]
    """float64 [targets, places]."""
    squares = np.empty((block.shape[0] - 1, places.size))
    for j in range(squares.shape[0]):
        for i in range(places.size):
            update = np.float64(block[j + 1, places[i]] - block[0, places[i]])
            squares[j, i] = update * update
    return squares


@kernel
def _sum(values, count):  # type: ignore[no-untyped-def]
    """The sum of the first `count` values by halves, in one fixed order that vector units can follow."""
    size = 1
    while size < count:
        size *= 2
    for i in range(count, size):
        values[i] = 0.0
    while size > 1:
        size //= 2
        for i in range(size):
            values[i] += values[i + size]
    return values[0] if count else 0.0


@kernel
def _merge(block, mask, eta, normalize, out):  # type: ignore[no-untyped-def]
    """Erases, and merges the rest; returns what `combine` does."""
    targets, n = eta.size, out.size
    total = np.empty(TILE)
    weight = np.empty(TILE)
    update = np.empty(TILE)
    deltas = np.empty((targets, TILE), np.float32)
    places = np.empty(TILE, np.int64)
    selected_count = 0
    kept_count = 0
    left_count = 0
    for start in range(0, n, TILE):
        size = min(TILE, n - start)
        base, merged = block[0, start : start + size], out[start : start + size]
        count = _chosen(mask, start, size, places)
        selected_count += count * targets
        total[:] = 0.0
        weight[:] = 0
        update[:] = 0
        for j in range(targets):
            row, delta = block[j + 1, start : start + size], deltas[j]
            if count == size:
                for i in range(size):
                    delta[i] = row[i] - base[i]
            else:
                for i in range(count):
                    delta[i] = row[places[i]] - base[places[i]]
            for i in range(count):
                total[i] += delta[i]
        for j in range(targets):
            delta = deltas[j]
            share = eta[j]
            moved = 0
            agreeing = 0
            for i in range(count):
                agrees = (delta[i] > 0) if total[i] >= 0 else (delta[i] < 0)
                moved += delta[i] != 0
                agreeing += agrees
                own = share if agrees else 0.0
                weight[i] += own
                update[i] += own * delta[i]
            kept_count += moved
            left_count += agreeing
        merged[:] = base
        for i in range(count):
            update[i] /= weight[i] if normalize and weight[i] > 0 else 1.0
        for i in range(count):
            merged[places[i]] += np.float32(update[i])
    return selected_count, kept_count, left_count
