"""What a method learns of a whole tensor before it merges it."""

from dataclasses import dataclass

import numpy as np

from fusechat.merge.selection import Selection


@dataclass(frozen=True)
class TensorStats:
    """`coefficients` float64 [targets]: how much each target counts. Where they come from the size of the updates,
    `squares` float64 [targets] are the sums that they are the shares of, which may be added up over a layer or the model."""

    coefficients: np.ndarray
    squares: np.ndarray | None = None
    selection: Selection | None = None
    scales: np.ndarray | None = None  # float64: by what kept updates are multiplied, a target each; of SLERP, the base
    key: int = 0  # of the random numbers that are the tensor's


def shares(squares: np.ndarray) -> np.ndarray:
    """float64 [targets]: each target's part of the sum; equal parts where nothing moved (arXiv 2408.07990, equation 7)."""
    total = squares.sum()
    return squares / total if total > 0 else np.full(len(squares), 1.0 / len(squares))
