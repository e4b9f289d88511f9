"""What a method computes from a whole tensor before it merges it."""

from dataclasses import dataclass

import numpy as np

from fusechat.merge.selection import Selection


@dataclass(frozen=True)
class TensorStats:
    """`coefficients` float64 [targets]: the targets' weights. `squares` float64 [targets]: the sums of squared updates that they
    are shares of, if they are; these can be summed over a layer or the model."""

    coefficients: np.ndarray
    squares: np.ndarray | None = None
    selection: Selection | None = None
    scales: np.ndarray | None = None  # float64 [targets]: factors of kept updates; SLERP's includes the base
    key: int = 0  # of the tensor's random numbers


def shares(squares: np.ndarray) -> np.ndarray:
    """float64 [targets]: each target's share of the sum; equal shares if it is 0 (arXiv 2408.07990, equation 7)."""
    total = squares.sum()
    return squares / total if total > 0 else np.full(len(squares), 1.0 / len(squares))
