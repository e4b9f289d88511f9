"""Averages the distributions of several candidates, row by row (AvgCE over the union of ids, arXiv 2401.10491)."""

from collections.abc import Sequence

import numpy as np

from fusechat.data.distributions import SparseDistribution

_NO_NLL = np.zeros(0, dtype=np.float32)


def mix(candidates: Sequence[SparseDistribution], weights: np.ndarray) -> SparseDistribution:
    """The average of n rows of each candidate with `weights` [candidates, n], over the union of their ids, most probable first.

    A row of one candidate only is kept as it is. If a candidate has no distribution in a row, the others share its weight in
    proportion. The tail is the average of their tails.
    """
    present = np.stack([(one.ids >= 0).any(axis=1) for one in candidates])
    share = np.where(present, weights, 0.0)
    total = share.sum(axis=0)
    share = share / np.where(total > 0, total, 1.0)
    alone = share.max(axis=0) == 1.0
    chosen = share.argmax(axis=0)
    mixed = np.flatnonzero((total > 0) & ~alone)
    union_ids, union_logprobs = _union([one.take(mixed) for one in candidates], share[:, mixed])
    width = max(*(one.ids.shape[1] for one in candidates), union_ids.shape[1])
    n = weights.shape[1]
    ids, logprobs = np.full((n, width), -1, np.int32), np.full((n, width), -np.inf, np.float32)
    tail = np.where(total > 0, sum(one.tail * by for one, by in zip(candidates, share, strict=True)), 1.0)
    for index, one in enumerate(candidates):
        rows = np.flatnonzero(alone & (chosen == index))
        ids[rows, : one.ids.shape[1]], logprobs[rows, : one.ids.shape[1]] = one.ids[rows], one.logprobs[rows]
    ids[mixed, : union_ids.shape[1]], logprobs[mixed, : union_ids.shape[1]] = union_ids, union_logprobs
    return SparseDistribution(ids, logprobs, _NO_NLL, tail)


def _union(candidates: Sequence[SparseDistribution], share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ share·P over the union of ids, as ids and log-probabilities."""
    n = share.shape[1]
    if not n:
        return np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32)
    ids = np.concatenate([one.ids for one in candidates], axis=1)
    mass = np.concatenate([one.probabilities * by[:, None] for one, by in zip(candidates, share, strict=True)], axis=1)
    order = np.argsort(ids, axis=1, kind="stable")
    ids, mass = np.take_along_axis(ids, order, 1), np.take_along_axis(mass, order, 1)
    begins = np.ones(ids.shape, dtype=bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    at = np.flatnonzero(begins)
    summed = np.zeros(ids.shape)
    summed.flat[at] = np.add.reduceat(mass.reshape(-1), at)
    summed[ids < 0] = 0.0
    order = np.argsort(-summed, axis=1, kind="stable")[:, : int((summed > 0).sum(axis=1).max())]
    ids, summed = np.take_along_axis(ids, order, 1), np.take_along_axis(summed, order, 1)
    with np.errstate(divide="ignore"):
        logprobs = np.log(summed).astype(np.float32)
    return np.where(summed > 0, ids, -1).astype(np.int32), logprobs
