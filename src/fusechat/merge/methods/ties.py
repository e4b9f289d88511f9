"""TIES (arXiv 2306.01708): trim, elect a sign, merge what agrees with it.

Keeps each target's `density` largest updates by magnitude, at least one (ties: lower flat index), and weighs them. At each
position, adds up those of the majority's sign, divided by the sum of their weights with `normalize`, times λ.
"""

import numpy as np

from fusechat.merge.kernels import CHUNK, kernel
from fusechat.merge.parameters import DENSITY, LAMBDA, WEIGHT, Parameter, Values
from fusechat.merge.selection import Selection, select
from fusechat.merge.stats import TensorStats
from fusechat.merge.task_vectors import Sparsify, combine_updates, no_sparsify, rescaling
from fusechat.merge.tensor import Tensor

PARAMETERS = (
    WEIGHT,
    DENSITY,
    Parameter("normalize", kind=bool, default=True),
    Parameter("rescale", kind=bool, default=False),
    LAMBDA,
)
BASE = True
TARGETS = None


def measure(tensor: Tensor, values: Values) -> TensorStats:
    """The targets' weights, and the updates to keep."""
    weights = np.array(values["weight"], np.float64)
    if all(density >= 1 for density in values["density"]):
        return TensorStats(weights)
    keep = np.array([_keep(density, tensor.size) for density in values["density"]], np.int64)
    selection = select(tensor, _keys, len(keep), lambda nonzero: keep)
    scales = rescaling(tensor, _trim(selection)) if values["rescale"] else None
    return TensorStats(weights, selection=selection, scales=scales)


def combine(
    block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
) -> tuple[int, int, int]:
    """Trims, elects the sign, and merges."""
    sparsify = _trim(measured.selection) if measured.selection else no_sparsify
    return combine_updates(block, start, values, out, sparsify=sparsify, scales=measured.scales, consensus=True)


def _keep(density: float, size: int) -> int:
    if density >= 1:
        return size
    return max(1, int(density * size)) if density > 0 else 0


def _keys(block: np.ndarray, row: int, out: np.ndarray) -> None:
    _apart(block[0], block[row + 1], out)


def _trim(selection: Selection) -> Sparsify:
    def sparsify(block: np.ndarray, start: int) -> int:
        chunks = slice(start // CHUNK, start // CHUNK - (-block.shape[1] // CHUNK))
        return sum(
            _trim_row(block[row + 1], threshold, selection.ties[row, chunks])
            for row, threshold in enumerate(selection.thresholds)
        )

    return sparsify


@kernel
def _apart(base, target, out):  # type: ignore[no-untyped-def]
    """The magnitude of target - base as a key."""
    delta = np.empty(1024, np.float32)
    bits = delta.view(np.uint32)
    for start in range(0, out.size, 1024):
        size = min(1024, out.size - start)
        b, t, keys = base[start : start + size], target[start : start + size], out[start : start + size]
        for i in range(size):
            delta[i] = t[i] - b[i]
        for i in range(size):
            keys[i] = np.int64(bits[i] & np.uint32(0x7FFFFFFF)) << 32


@kernel
def _trim_row(delta, threshold, ties):  # type: ignore[no-untyped-def]
    """Zeroes the updates that are not selected, and returns how many are; `ties` are those of their chunks."""
    bits = delta.view(np.uint32)
    count = 0
    for chunk in range(ties.size):
        part = bits[chunk * CHUNK : (chunk + 1) * CHUNK]
        left = ties[chunk]
        equal = 0
        for i in range(part.size):
            equal += np.int64(part[i] & np.uint32(0x7FFFFFFF)) << 32 == threshold
        if left == 0 or left == equal:
            below = threshold - (left > 0)
            for i in range(part.size):
                chosen = np.int64(part[i] & np.uint32(0x7FFFFFFF)) << 32 > below
                part[i] = part[i] if chosen else np.uint32(0)
                count += chosen
            continue
        for i in range(part.size):
            key = np.int64(part[i] & np.uint32(0x7FFFFFFF)) << 32
            tie = key == threshold and left > 0
            left -= tie
            chosen = key > threshold or tie
            part[i] = part[i] if chosen else np.uint32(0)
            count += chosen
    return count
