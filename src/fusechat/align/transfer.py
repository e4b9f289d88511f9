"""Distribution transfer: `q_i(t) = Σ_s p_j(s) · W[s, t]`. Collisions are summed; mass is conserved. See docs/alignment.md."""

from dataclasses import dataclass

import numpy as np

from fusechat.align.candidates import Candidates
from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.distributions import SparseDistribution, left_over
from fusechat.run.compiled import compiled


@dataclass(frozen=True)
class Transferred:
    """`rows`: the k most likely pivot tokens of every pivot row (only pads if nothing corresponds), and the tail. `mapped`
    float64 [n]: the mass that reached pivot tokens, kept or not."""

    rows: SparseDistribution
    mapped: np.ndarray


class Transfer:
    """Maps candidates to a pivot vocabulary of `size` tokens. Keeps a dense row as a buffer between conversations."""

    def __init__(self, vocabulary_map: VocabularyMap, size: int) -> None:
        self.map = vocabulary_map
        self._dense = np.zeros(max(size, int(vocabulary_map.pivot.max(initial=-1)) + 1))

    def __call__(self, candidates: Candidates, gold: np.ndarray, *, k: int) -> Transferred:
        """Sums the mass of each pivot token and keeps the `k` largest of each row, the lower id first of equals. `gold` int
        [n]: the rows' gold tokens, always kept where the source's own token is a candidate (`candidates.own`)."""
        if int(gold.max(initial=-1)) >= len(self._dense):  # in the padding of the model's vocabulary
            self._dense = np.zeros(int(gold.max()) + 1)
        ids, mass, mapped = _transfer(
            candidates.row,
            candidates.mass,
            gold.astype(np.int64),
            (candidates.own, candidates.chained),
            (self.map.offset, self.map.pivot, self.map.weight),
            self._dense,
            k,
        )
        logprobs = np.full(mass.shape, -np.inf)
        np.log(mass, out=logprobs, where=ids >= 0)
        rows = SparseDistribution(ids, logprobs, np.zeros(0, dtype=np.float32), left_over(mass))
        return Transferred(rows=rows, mapped=np.minimum(mapped, 1.0))


@compiled()
def _transfer(
    row: np.ndarray,
    mass: np.ndarray,
    gold: np.ndarray,
    chain: tuple[np.ndarray, np.ndarray],
    entries: tuple[np.ndarray, np.ndarray, np.ndarray],
    dense: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `k` largest of each row, ids and mass [n, k], and the total mapped mass [n]. `dense` is zero before and after."""
    own, chained = chain
    n = len(row)
    ids, kept = np.full((n, k), -1, dtype=np.int32), np.zeros((n, k))
    mapped = np.zeros(n)
    touched = np.empty(len(dense), dtype=np.int64)
    for i in range(n):
        share = chained[i] if own[i] else np.nan
        count = _scatter(row[i], mass[i], gold[i], share, entries, dense, touched)
        own_mass = dense[gold[i]]
        mapped[i] = _largest(dense, touched[:count], ids[i], kept[i])
        if own[i] and own_mass > 0.0 and not (ids[i] == gold[i]).any():
            ids[i, k - 1], kept[i, k - 1] = gold[i], own_mass
    return ids, kept, mapped


@compiled()
def _scatter(
    row: np.ndarray,
    mass: np.ndarray,
    gold: int,
    share: float,
    entries: tuple[np.ndarray, np.ndarray, np.ndarray],
    dense: np.ndarray,
    touched: np.ndarray,
) -> int:
    """Adds the mass [c] of all candidates to `dense` by their rows of W [c]; returns the number of `touched` tokens. If the
    gold token's `share` of the last candidate is known (not NaN), W's other entries are scaled to the rest."""
    offset, pivot, weight = entries
    count = 0
    for c in range(len(row)):
        if row[c] < 0:
            continue
        begin, end = offset[row[c]], offset[row[c] + 1]
        factor, known = mass[c], c == len(row) - 1 and not np.isnan(share)
        if known:
            counted = 0.0
            for at in range(begin, end):
                if pivot[at] == gold:
                    counted = weight[at]
            factor = mass[c] * (1.0 - share) / (1.0 - counted) if counted < 1.0 else 0.0
            if mass[c] * share > 0.0:
                if dense[gold] == 0.0:
                    touched[count] = gold
                    count += 1
                dense[gold] += mass[c] * share
        for at in range(begin, end):
            token, part = pivot[at], factor * weight[at]
            if part > 0.0 and not (known and token == gold):
                if dense[token] == 0.0:
                    touched[count] = token
                    count += 1
                dense[token] += part
    return count


@compiled()
def _largest(dense: np.ndarray, tokens: np.ndarray, ids: np.ndarray, kept: np.ndarray) -> float:
    """Sorts the largest into `ids` and `kept` [k], the lower id first of equals; clears `dense`; returns the sum of all."""
    k, filled, total = len(ids), 0, 0.0
    for token in tokens:
        value = dense[token]
        dense[token] = 0.0
        total += value
        place = min(filled, k - 1)
        if filled == k and (kept[place] > value or (kept[place] == value and ids[place] < token)):
            continue
        while place > 0 and (kept[place - 1] < value or (kept[place - 1] == value and ids[place - 1] > token)):
            kept[place], ids[place] = kept[place - 1], ids[place - 1]
            place -= 1
        kept[place], ids[place] = value, token
        filled = min(filled + 1, k)
    return total
