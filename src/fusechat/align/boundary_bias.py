"""Boundary bias: positions where the source itself would rarely have ended a token.

A source's distribution after a token depends on the token ending there. If most of its mass was on longer tokens with the same
first bytes, the boundary reveals what comes next, and a pivot with other boundaries cannot know it.
"""

import numpy as np

from fusechat.align.spelling import Spelling
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared

RARE_BOUNDARY = 0.1  # a boundary of lower `boundary_probability` is rare


def boundary_probability(source: Prepared, captured: SparseDistribution, spelling: Spelling) -> np.ndarray:
    """For each source row, the probability that the token before it ends there: float64 [n].

    It is the share of that token in the mass of the token and of the kept candidates that continue its bytes. 1 at the start of
    a response and at its end of turn.
    """
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
