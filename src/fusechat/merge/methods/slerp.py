"""SLERP: moves from the base towards one other model by `t` of the arc between them, each tensor as one vector.

As in mergekit, nearly parallel or opposite vectors (|cosine| > 0.9995) are interpolated linearly; a zero vector is at a right
angle.
"""

import math

import numpy as np

from fusechat.merge.kernels import CHUNK, kernel
from fusechat.merge.parameters import Parameter, Values
from fusechat.merge.stats import TensorStats
from fusechat.merge.tensor import Tensor

PARAMETERS = (Parameter("t", low=0, high=1),)
BASE = True
TARGETS = 1
PARALLEL = 0.9995


def measure(tensor: Tensor, values: Values) -> TensorStats:
    """The cosine of both tensors, and their factors."""
    squares, products, others = tensor.sums((3,), lambda _, block, sums: _products(block, sums))
    lengths = [length if length > 1e-8 else 1.0 for length in (math.sqrt(squares), math.sqrt(others))]
    own, other = slerp_factors(products / (lengths[0] * lengths[1]), values["t"])
    return TensorStats(np.array([other]), scales=np.array([own]))


def slerp_factors(cosine: float, t: float) -> tuple[float, float]:
    """The factors of the base and of the other vector."""
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def combine(
    block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
) -> tuple[int, int, int]:
    """Writes the interpolated block."""
    assert measured.scales is not None
    np.multiply(block[0], np.float32(measured.scales[0]), out=out)
    out += np.float32(measured.coefficients[0]) * block[1]
    return out.size, out.size, out.size


@kernel
def _products(block, sums):  # type: ignore[no-untyped-def]
    """Adds to `sums` float64 [3, chunks] the products base·base, base·other, other·other."""
    lanes = np.empty((3, 512))
    n = block.shape[1]
    for chunk in range(sums.shape[1]):
        lanes[:] = 0.0
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, n), 512):
            base, other = block[0, start : min(start + 512, n)], block[1, start : min(start + 512, n)]
            for i in range(base.size):
                own, its = np.float64(base[i]), np.float64(other[i])
                lanes[0, i] += own * own
                lanes[1, i] += own * its
                lanes[2, i] += its * its
        for row in range(3):
            total = 0.0
            for i in range(512):
                total += lanes[row, i]
            sums[row, chunk] += total
