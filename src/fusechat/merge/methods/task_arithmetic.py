"""Task arithmetic (arXiv 2212.04089): base + λ Σ w δ, divided by Σ w with `normalize`."""

import numpy as np

from fusechat.merge.parameters import LAMBDA, WEIGHT, Parameter, Values
from fusechat.merge.stats import TensorStats
from fusechat.merge.task_vectors import combine_updates
from fusechat.merge.tensor import Tensor

PARAMETERS = (WEIGHT, Parameter("normalize", kind=bool, default=False), LAMBDA)
BASE = True
TARGETS = None


def measure(tensor: Tensor, values: Values) -> TensorStats:
    """The targets' weights."""
    return TensorStats(np.array(values["weight"], np.float64))


def combine(
    block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
) -> tuple[int, int, int]:
    """Writes base + λ Σ w δ."""
    return combine_updates(block, start, values, out)
