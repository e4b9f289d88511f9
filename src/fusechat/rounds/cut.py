"""Which rows of a sampled answer are learnt: those for which the teacher has a distribution, up to the first wrong token."""

import numpy as np

from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import ROWS, Prepared


def kept_rows(gold: np.ndarray, targets: SparseDistribution, until_wrong: float) -> np.ndarray:
    """bool [n]: rows that have a target, up to and including the first at which that gives less than the share `until_wrong` of
    its kept mass to the row's own token, `gold` int [n]. Behind that token a source speaks of a text that it would not write. Rows
    without a target are skipped, and cut nothing off."""
    mass = targets.probabilities
    has = (targets.ids >= 0).any(axis=1)
    own = np.where(targets.ids == gold[:, None], mass, 0.0).sum(axis=1)
    wrong = np.flatnonzero(has & (own < until_wrong * mass.sum(axis=1)))
    last = int(wrong[0]) if len(wrong) else len(gold) - 1
    return np.asarray(has & (np.arange(len(gold)) <= last))


def take_rows(rows: Prepared, kept: np.ndarray) -> Prepared:
    """The conversation with the `kept` rows alone, bool [n], one at least; its tokens end with the last of them."""
    columns = {name: getattr(rows, name)[kept] for name in ROWS}
    tokens = rows.input_ids[: int(columns["position"][-1]) + 1]
    return Prepared(id=rows.id, input_ids=tokens, content_bytes=rows.content_bytes, **columns)
