"""The chain rule for the gold token: what a source predicts for the actual text, exactly, from its captured nll.

Where a pivot token ends at the end of a later source token, its probability is the product of theirs: given the first, the
product of the others replaces the average in W. The source's own token becomes a candidate even if it was not kept. (This uses
the actual text, for the gold token only; the maps are evaluated without it.)
"""

import numpy as np

from fusechat.align.candidates import NONE, Candidates
from fusechat.align.sequence import Alignment, number_line
from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared


def following(alignment: Alignment, pivot: Prepared, source: Prepared, nll: np.ndarray) -> np.ndarray:
    """The probability of the whole source tokens after the first, up to the pivot token's end, given the first: float64
    [n_pivot]. `nll` [n_source] in nats. NaN if there are no such tokens, or the pivot token ends inside one."""
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
    """Adds the source's own token as the last candidate, with the probability exp(-nll) if it was not kept. Not inside a source
    token: adding it to the few candidates left there would use the actual text beforehand."""
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
