"""Distribution transfer: `q_i(t) = Σ_s p_j(s) · W[s, t]`, collisions summed, mass conserved. Source: METHOD, "Vocabulary map"."""

from dataclasses import dataclass

import numba
import numpy as np

from fusechat.align.candidates import Candidates
from fusechat.align.vocabulary import VocabularyMap
from fusechat.core.distributions import SparseDistribution


@dataclass(frozen=True)
class Transferred:
    """`rows`: the k most likely pivot tokens of every pivot row (all pads where nothing corresponds). `tail` float64 [n]: the
    mass that they leave out. `mapped` float64 [n]: the mass that reached some pivot token, kept or not."""

    rows: SparseDistribution
    tail: np.ndarray
    mapped: np.ndarray


class Transfer:
    """Carries candidates over to a pivot vocabulary of `size` tokens; keeps room for a dense row between conversations."""

    def __init__(self, vocabulary_map: VocabularyMap, size: int) -> None:
        self.map = vocabulary_map
        self._dense = np.zeros(max(size, int(vocabulary_map.pivot.max(initial=-1)) + 1))

    def __call__(self, candidates: Candidates, gold: np.ndarray, *, k: int) -> Transferred:
        """Sums what arrives at each pivot token, and keeps the `k` largest of each row; of equals the lower token id first.

        `gold` int [n]: the rows' own pivot tokens, kept in any case where the source's own token is a candidate (`candidates.own`).
        """
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
        return Transferred(
            rows=SparseDistribution(ids, logprobs, np.zeros(0, dtype=np.float32)),
            tail=np.clip(1.0 - mass.sum(axis=1), 0.0, 1.0),
            mapped=np.minimum(mapped, 1.0),
        )


@numba.njit(cache=True, nogil=True)
def _transfer(
    row: np.ndarray,
    mass: np.ndarray,
    gold: np.ndarray,
    chain: tuple[np.ndarray, np.ndarray],
    entries: tuple[np.ndarray, np.ndarray, np.ndarray],
    dense: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`dense` is zero before and after."""
    (is_own, chained), (offset, pivot, weight) = chain, entries
    n, width = row.shape
    ids, kept = np.full((n, k), -1, dtype=np.int32), np.zeros((n, k))
    mapped = np.zeros(n)
    touched = np.empty(len(dense), dtype=np.int64)
    for i in range(n):
        count = 0
        for c in range(width):
            entry = row[i, c]
            if entry < 0 or mass[i, c] <= 0.0:
                continue
            factor, sharpened = mass[i, c], False
            if c == width - 1 and is_own[i] and not np.isnan(chained[i]):
                # The row of W of the source's own token gives its gold pivot token `chained`, and scales the others down.
                share = 0.0
                for at in range(offset[entry], offset[entry + 1]):
                    if pivot[at] == gold[i]:
                        share = weight[at]
                factor = mass[i, c] * (1.0 - chained[i]) / (1.0 - share) if share < 1.0 else 0.0
                sharpened = True
                if dense[gold[i]] == 0.0:
                    touched[count] = gold[i]
                    count += 1
                dense[gold[i]] += mass[i, c] * chained[i]
            for at in range(offset[entry], offset[entry + 1]):
                token = pivot[at]
                if sharpened and token == gold[i]:
                    continue
                if dense[token] == 0.0:
                    touched[count] = token
                    count += 1
                dense[token] += factor * weight[at]
        own = dense[gold[i]]
        filled = 0
        for at in range(count):
            token = touched[at]
            value = dense[token]
            dense[token] = 0.0
            mapped[i] += value
            if value <= 0.0:
                continue
            place = filled if filled < k else k - 1
            if filled == k and (kept[i, place] > value or (kept[i, place] == value and ids[i, place] < token)):
                continue
            while place > 0 and (
                kept[i, place - 1] < value or (kept[i, place - 1] == value and ids[i, place - 1] > token)
            ):
                kept[i, place], ids[i, place] = kept[i, place - 1], ids[i, place - 1]
                place -= 1
            kept[i, place], ids[i, place] = value, token
            filled = min(filled + 1, k)
        if is_own[i] and own > 0.0 and not (ids[i] == gold[i]).any():
            ids[i, k - 1], kept[i, k - 1] = gold[i], own
    return ids, kept, mapped
