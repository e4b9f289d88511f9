"""Boundary bias: places where the source itself would rarely have cut.

A source's distribution after a token knows that the token ended there. Where most of the source's mass went to longer tokens
that begin with the same bytes, its cut tells what comes next, and a pivot that cuts otherwise does not know that.
"""

import numpy as np

from fusechat.align.spelling import Spelling
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared

# Of the source's mass on what begins with the bytes of the token before, at most this on that very token.
RARE_BOUNDARY = 0.1


def boundary_probability(source: Prepared, captured: SparseDistribution, spelling: Spelling) -> np.ndarray:
    """For every source row the share of its mass, one row before, on the very token that stands there, among that token and
    the kept candidates that continue after its bytes: float64 [n]; 1 at the start of a response and at its end of turn."""
    lengths = spelling.lengths
    known = np.minimum(source.gold, len(lengths) - 1)
    length = np.where(source.gold < len(lengths), lengths[known], 0)
    longer = spelling.left_over(captured.ids, source.gold, length) > 0
    more = np.where(longer, captured.probabilities, 0.0).sum(axis=1)
    own = np.exp(-captured.nll.astype(np.float64))
    share = np.divide(own, own + more, out=np.ones(len(own)), where=(own + more > 0) & (length > 0))
    before = np.concatenate([[1.0], share[:-1]])
    first = np.append(True, np.diff(source.response) != 0)
    return np.where(first | source.end_of_turn, 1.0, before)
