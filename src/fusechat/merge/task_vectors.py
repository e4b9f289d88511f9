"""Shared by the task arithmetic family (arXiv 2212.04089, 2306.01708, 2311.03099): sparse updates, weighted and added up, as in
mergekit's generalized task arithmetic."""

from collections.abc import Callable

import numpy as np

from fusechat.merge.kernels import CHUNK, kernel
from fusechat.merge.parameters import Values
from fusechat.merge.tensor import Tensor

ZERO = 1e-8  # a smaller sum of weights does not divide
TILE = 1024  # positions that fit the core's L1 cache
Sparsify = Callable[
    [np.ndarray, int], int
]  # (block with updates, start): zeroes what is dropped, returns how many are kept


def no_sparsify(block: np.ndarray, start: int) -> int:
    """Keeps all updates; returns how many."""
    return (block.shape[0] - 1) * block.shape[1]


def rescaling(tensor: Tensor, sparsify: Sparsify) -> np.ndarray:
    """float64 [targets]: the factor that restores the sum of magnitudes of each target's update after `sparsify`. 1 if either
    sum is below 1e-7, as in mergekit."""

    def add(start: int, block: np.ndarray, sums: np.ndarray) -> None:
        subtract_base(block)
        _magnitudes(block, sums[0])
        sparsify(block, start)
        _magnitudes(block, sums[1])

    before, after = tensor.sums((2, len(tensor.inputs) - 1), add)
    small = (before < 1e-7) | (after < 1e-7)
    return np.where(small, 1.0, before / np.where(small, 1.0, after))


def combine_updates(
    block: np.ndarray,
    start: int,
    values: Values,
    out: np.ndarray,
    *,
    sparsify: Sparsify = no_sparsify,
    scales: np.ndarray | None = None,
    consensus: bool = False,
) -> tuple[int, int, int]:
    """Writes base + λ Σ w δ, divided by the sum of weights with `normalize`; with `consensus` only of the majority's sign. The
    majority is the sign of Σ w δ at that position, positive if zero. Returns what a method's `combine` does."""
    subtract_base(block)
    selected = sparsify(block, start)
    weights = np.array(values["weight"], np.float64)
    factors = (weights if scales is None else weights * scales).astype(np.float32)
    kept, left = _weighted_sum(block, factors, weights, consensus, values["normalize"], values["lambda"], out)
    return selected, kept, left


@kernel
def subtract_base(block):  # type: ignore[no-untyped-def]
    """Replaces the targets of a block by their updates, in place."""
    base = block[0]
    for j in range(1, block.shape[0]):
        row = block[j]
        for i in range(base.size):
            row[i] -= base[i]


@kernel
def _magnitudes(block, sums):  # type: ignore[no-untyped-def]
    """Adds to `sums` float64 [targets, chunks] the magnitudes of the updates."""
    lanes = np.empty(512)
    n = block.shape[1]
    for j in range(1, block.shape[0]):
        for chunk in range(sums.shape[1]):
            lanes[:] = 0.0
            for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, n), 512):
                piece = block[j, start : min(start + 512, n)]
                for i in range(piece.size):
                    lanes[i] += abs(np.float64(piece[i]))
            total = 0.0
            for i in range(512):
                total += lanes[i]
            sums[j - 1, chunk] += total


@kernel
def _weighted_sum(block, factors, weights, consensus, normalize, scale, out):  # type: ignore[no-untyped-def]
    targets, n = factors.size, out.size
    whole = weights.sum()
    if abs(whole) < ZERO or not normalize:
        whole = 1.0
    total = np.empty(TILE)
    divisor = np.empty(TILE)
    update = np.empty(TILE, np.float32)
    kept = 0
    left = 0
    for start in range(0, n, TILE):
        size = min(TILE, n - start)
        base, merged = block[0, start : start + size], out[start : start + size]
        total[:] = 0.0
        divisor[:] = 0
        update[:] = 0
        if consensus:
            for j in range(targets):
                delta, factor = block[j + 1, start : start + size], np.float64(factors[j])
                for i in range(size):
                    total[i] += factor * delta[i]
        for j in range(targets):
            delta, factor, weight = block[j + 1, start : start + size], factors[j], weights[j]
            moved = 0
            agreeing = 0
            if consensus:
                for i in range(size):
                    weighted = factor * delta[i]
                    agrees = (weighted > 0) if total[i] >= 0 else (weighted < 0)
                    moved += delta[i] != 0
                    agreeing += agrees
                    update[i] += weighted if agrees else np.float32(0)
                    divisor[i] += weight if agrees else 0.0
            else:
                for i in range(size):
                    update[i] += factor * delta[i]
                    moved += delta[i] != 0
                agreeing = moved
            kept += moved
            left += agreeing
        for i in range(size):
            below = whole
            if consensus and normalize:
                below = divisor[i] if abs(divisor[i]) >= ZERO else 1.0
            merged[i] = base[i] + np.float32(update[i] / below * scale)
    return kept, left


@kernel
def drop(delta, mask):  # type: ignore[no-untyped-def]
    """Zeroes the updates that are not in the mask; returns how many remain."""
    count = 0
    for i in range(delta.size):
        delta[i] = delta[i] if mask[i] else np.float32(0)
        count += mask[i]
    return count
