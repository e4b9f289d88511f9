"""VaRM (FuseChat's first version, arXiv 2402.16107): θ = Σ w θ over the targets, w their shares in the squared updates."""

import numpy as np

from fusechat.merge.kernels import kernel, update_squares
from fusechat.merge.parameters import SCOPES, Parameter, Values
from fusechat.merge.stats import TensorStats, shares
from fusechat.merge.tensor import Tensor

PARAMETERS: tuple[Parameter, ...] = ()
BASE = True
GRANULARITIES = SCOPES
TARGETS = None


def measure(tensor: Tensor, values: Values) -> TensorStats:
    """The coefficients: each target's share in the squared updates."""
    squares = tensor.sums((len(tensor.inputs) - 1,), lambda _, block, sums: update_squares(block, sums))
    return TensorStats(shares(squares), squares)


def combine(
    block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
) -> tuple[int, int, int]:
    """Writes Σ w θ of the targets."""
    _add_shares(block, measured.coefficients.astype(np.float32), out)
    entries = (block.shape[0] - 1) * block.shape[1]
    return entries, entries, entries


@kernel
def _add_shares(block, weights, out):  # type: ignore[no-untyped-def]
    """The base's θ + Σ w δ: equals Σ w θ of the targets, since the weights sum to one, and exact where nothing moved."""
    for start in range(0, out.size, 1024):
        merged = out[start : start + 1024]
        base = block[0, start : start + merged.size]
        merged[:] = 0
        for j in range(weights.size):
            row, weight = block[j + 1, start : start + merged.size], weights[j]
            for i in range(merged.size):
                merged[i] += weight * (row[i] - base[i])
        for i in range(merged.size):
            merged[i] += base[i]
