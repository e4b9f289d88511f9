"""Distribution transfer: `q_i(t) = Σ_s p_j(s) · W[s, t]`, collisions summed, mass conserved. Source: METHOD, "Vocabulary map"."""

from dataclasses import dataclass

import numpy as np

from fusechat.align.sequence import Alignment
from fusechat.align.vocabulary import TAIL, BackOff, VocabularyMap
from fusechat.core.distributions import SparseDistribution
from fusechat.core.spans import TokenBytes


@dataclass(frozen=True)
class Transferred:
    """`rows`: the k most likely pivot tokens of every pivot row (all pads where nothing corresponds). `tail` float64 [n]: the
    mass that they leave out. `mapped` float64 [n]: the mass that reached some pivot token, kept or not."""

    rows: SparseDistribution
    tail: np.ndarray
    mapped: np.ndarray


def transfer(rows: np.ndarray, tokens: np.ndarray, mass: np.ndarray, *, n: int, k: int) -> Transferred:
    """Sums `mass` [m] of (row, pivot token) entries, `rows`, `tokens` int64 [m], and keeps the `k` largest of each of `n` rows.

    Ties go to the lower token id. What is not kept stays in the tail, so that kept mass and tail sum to one.
    """
    keys, where = np.unique((rows << 32) | tokens, return_inverse=True)
    summed = np.bincount(where, weights=mass, minlength=len(keys)) if len(keys) else np.zeros(0)
    row, token = keys >> 32, keys & 0xFFFFFFFF
    mapped = np.bincount(row, weights=summed, minlength=n) if len(keys) else np.zeros(n)
    order = np.lexsort((token, -summed, row))
    row, token, summed = row[order], token[order], summed[order]
    first = np.searchsorted(row, np.arange(n))
    rank = np.arange(len(row)) - first[row]
    kept = (rank < k) & (summed > 0)
    ids = np.full((n, k), -1, dtype=np.int32)
    logprobs = np.full((n, k), -np.inf)
    ids[row[kept], rank[kept]] = token[kept]
    logprobs[row[kept], rank[kept]] = np.log(summed[kept])
    probabilities = np.where(ids >= 0, np.exp(logprobs), 0.0).sum(axis=1)
    return Transferred(
        rows=SparseDistribution(ids, logprobs, np.zeros(0, dtype=np.float32)),
        tail=np.clip(1.0 - probabilities, 0.0, 1.0),
        mapped=np.minimum(mapped, 1.0),
    )


def mapped_entries(
    alignment: Alignment, source: SparseDistribution, vocabulary_map: VocabularyMap
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pivot row, pivot token, mass) of every candidate at unclipped aligned positions, through W."""
    pivot_rows = np.flatnonzero(alignment.unclipped)
    source_rows = alignment.source_row[pivot_rows]
    candidates = source.ids[source_rows]  # [aligned, k]
    real = candidates >= 0
    row = np.repeat(pivot_rows, candidates.shape[1]).reshape(candidates.shape)[real]
    mass = source.probabilities[source_rows][real]
    entry = vocabulary_map.rows_of(candidates[real].astype(np.int64))
    length = np.diff(vocabulary_map.offset)[entry]
    index = np.repeat(vocabulary_map.offset[entry] - np.concatenate([[0], np.cumsum(length)[:-1]]), length) + np.arange(
        length.sum()
    )
    return np.repeat(row, length), vocabulary_map.pivot[index], np.repeat(mass, length) * vocabulary_map.weight[index]


def clipped_entries(
    alignment: Alignment,
    source: SparseDistribution,
    *,
    gold: tuple[np.ndarray, np.ndarray],
    spell: tuple[TokenBytes, TokenBytes],
    back_off: BackOff,
    roles: dict[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same where a token takes in template text before the content (`▁Hello`): a candidate loses what the source's own token
    took in, gets what the pivot's did, and is looked up by its bytes; one that does not begin with it goes to the tail.

    `gold` are the pivot's and the source's own tokens of their rows, `spell` the bytes of their tokens.
    """
    row, token, mass = [], [], []
    probabilities = source.probabilities
    for pivot_row in np.flatnonzero((alignment.source_row >= 0) & ~alignment.unclipped).tolist():
        source_row = int(alignment.source_row[pivot_row])
        given = spell[0][int(gold[0][pivot_row])][: int(alignment.pivot_clip[pivot_row])]
        taken = spell[1][int(gold[1][source_row])][: int(alignment.source_clip[pivot_row])]
        for candidate, probability in zip(
            source.ids[source_row].tolist(), probabilities[source_row].tolist(), strict=True
        ):
            if candidate < 0:
                continue
            data = spell[1][candidate]
            if candidate in spell[1].special:
                target = roles.get(candidate, TAIL)
            elif data.startswith(taken) and len(data) > len(taken):
                target, _ = back_off(given + data[len(taken) :])
            else:
                target = TAIL
            if target != TAIL:
                row.append(pivot_row)
                token.append(target)
                mass.append(probability)
    return np.array(row, dtype=np.int64), np.array(token, dtype=np.int64), np.array(mass, dtype=np.float64)
