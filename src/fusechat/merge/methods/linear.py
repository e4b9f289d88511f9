"""Linear (arXiv 2203.05482): the weighted sum of all models, divided by the sum of the weights with `normalize`."""

import numpy as np

from fusechat.errors import RecipeError
from fusechat.merge.kernels import kernel
from fusechat.merge.parameters import WEIGHT, Parameter, Values
from fusechat.merge.stats import TensorStats
from fusechat.merge.tensor import Tensor

PARAMETERS = (WEIGHT, Parameter("normalize", kind=bool, default=True))
BASE = False
TARGETS = None


def check(name: str, values: Values) -> None:
    """Raises RecipeError if `normalize` would divide by zero."""
    if values["normalize"] and abs(np.sum(values["weight"], dtype=np.float64)) < 1e-8:
        raise RecipeError(f"weight: the weights of {name} add up to zero, and normalize divides by their sum")


def measure(tensor: Tensor, values: Values) -> TensorStats:
    """The models' weights. Raises RecipeError as `check` does."""
    check(tensor.name, values)
    return TensorStats(np.array(values["weight"], np.float64))


def combine(
    block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
) -> tuple[int, int, int]:
    """Writes Σ w θ, divided by Σ w with `normalize`."""
    weights = measured.coefficients
    _weighted_sum(block, weights.astype(np.float32), np.float32(weights.sum() if values["normalize"] else 1.0), out)
    entries = block.size
    return entries, entries, entries


@kernel
def _weighted_sum(block, weights, divisor, out):  # type: ignore[no-untyped-def]
    for start in range(0, out.size, 1024):
        merged = out[start : start + 1024]
        merged[:] = 0
        for j in range(weights.size):
            row, weight = block[j, start : start + merged.size], weights[j]
            for i in range(merged.size):
                merged[i] += weight * row[i]
        for i in range(merged.size):
            merged[i] /= divisor
