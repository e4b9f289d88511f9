"""DARE with the sign election of TIES (arXiv 2311.03099): updates dropped at random, then as TIES."""

import numpy as np

from fusechat.merge import dare
from fusechat.merge.parameters import Values
from fusechat.merge.stats import TensorStats

PARAMETERS = dare.PARAMETERS
BASE = True
TARGETS = None
measure = dare.measure


def combine(
    block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
) -> tuple[int, int, int]:
    return dare.combine(block, start, measured, values, out, consensus=True)
