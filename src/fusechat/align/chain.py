"""The gold token by the chain rule: what a source says about the text that is there, known exactly from its captured nll.

Where a pivot token continues to the end of several whole source tokens, the source's probability of them is the product over
them: given the first, the others' product takes the place of what W says on average. And the source's own token is a
candidate even where it is not among the kept ones. (A hindsight about the gold token alone: the maps are judged without it.)
"""

import numpy as np

from fusechat.align.candidates import NONE, Candidates
from fusechat.align.sequence import Alignment, number_line
from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared


def following(alignment: Alignment, pivot: Prepared, source: Prepared, nll: np.ndarray) -> np.ndarray:
    """The probability, given the source's token at which a pivot token starts, of the whole source tokens after it up to the byte
    where the pivot token ends: float64 [n_pivot], NaN where there are none or where it ends inside one."""
    ours, theirs = number_line(pivot, source)
    first = np.where(alignment.inside, alignment.inside_row, alignment.source_row)
    starts = (ours[:, 0] == theirs[first, 0]) | alignment.inside
    wide = np.flatnonzero(theirs[:, 1] > theirs[:, 0])
    at = np.minimum(np.searchsorted(theirs[wide, 1], ours[:, 1]), len(wide) - 1)
    last = wide[at]
    together = (first >= 0) & starts & (theirs[last, 1] == ours[:, 1]) & (last > first) & ~pivot.end_of_turn
    total = np.concatenate([[0.0], np.cumsum(nll.astype(np.float64))])
    return np.where(together, np.exp(total[first + 1] - total[last + 1]), np.nan)


def with_own_token(
    candidates: Candidates,
    alignment: Alignment,
    pivot: Prepared,
    source: Prepared,
    captured: SparseDistribution,
    vocabulary_map: VocabularyMap,
) -> Candidates:
    """The candidates with the source's own token as the last one. Where it was not kept it has its mass from its nll; not so
    inside a source token, where to add it to the few that are left would be to know it beforehand."""
    first = np.where(alignment.inside, alignment.inside_row, alignment.source_row)
    gold = source.gold[first]
    kept = (captured.ids[first] == gold[:, None]) & (first >= 0)[:, None] & (candidates.row >= 0)
    new = alignment.unclipped & ~(captured.ids[first] == gold[:, None]).any(axis=1)
    row = np.concatenate([candidates.row, np.full((len(first), 1), NONE)], axis=1)
    mass = np.concatenate([candidates.mass, np.zeros((len(first), 1))], axis=1)
    where, column = np.nonzero(kept)
    row[where, -1], mass[where, -1] = row[where, column], mass[where, column]
    row[where, column], mass[where, column] = NONE, 0.0
    row[new, -1] = vocabulary_map.rows_of(gold[new].astype(np.int64))
    mass[new, -1] = np.exp(-captured.nll[first[new]].astype(np.float64))
    return Candidates(row, mass, own=row[:, -1] >= 0, chained=following(alignment, pivot, source, captured.nll))
