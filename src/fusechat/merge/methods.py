"""Merging methods: pure functions on one parameter tensor of every model, in float32. Source: METHOD, "Merging"."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Merged:
    """`tensor`: the merged parameter. `coefficients`: η of each target, summing to one. `selected`, `erased`: share of all entries
    that Select kept, and of the kept entries of all targets that Erase zeroed."""

    tensor: np.ndarray
    coefficients: list[float]
    selected: float
    erased: float


def linear(pivot: np.ndarray, targets: list[np.ndarray]) -> Merged:
    """The targets' mean."""
    mean = np.zeros_like(pivot, dtype=np.float32)
    for target in targets:
        mean += target
    mean /= np.float32(len(targets))
    return Merged(mean, [1.0 / len(targets)] * len(targets), 1.0, 0.0)


def sce(
    pivot: np.ndarray,
    targets: list[np.ndarray],
    *,
    select_topk: float = 1.0,
    select_deltas: bool = True,
    normalize: bool = True,
) -> Merged:
    """Select, calculate, erase (arXiv 2408.07990, Algorithm 1, equations 5 to 9) on one tensor.

    `pivot` and each of `targets` float32 of one shape. `select_topk` is τ: of the positions whose population variance over the
    targets is not zero, the share with the highest is kept (ties: lower flat index). `select_deltas: false` applies Select to the
    coefficients only, as the paper's repository does; `normalize: false` is equation 9 as printed.
    """
    shape = pivot.shape
    base = pivot.reshape(-1)
    deltas = np.stack([target.reshape(-1) - base for target in targets])  # float32 [targets, entries]
    chosen = _select(deltas, select_topk)
    selected = deltas if chosen is None else np.where(chosen, deltas, np.float32(0))
    eta = _coefficients(selected)
    kept = selected if select_deltas else deltas
    agrees = (kept >= 0) == (kept.sum(axis=0, dtype=np.float32) >= 0)  # a zero sum counts as positive
    left = agrees & (kept != 0)
    weights = np.where(left, eta.astype(np.float32)[:, None], np.float32(0))
    update = (weights * kept).sum(axis=0, dtype=np.float32)
    if normalize:
        total = weights.sum(axis=0, dtype=np.float32)
        update = np.divide(update, total, out=np.zeros_like(update), where=total > 0)
    nonzero = int((kept != 0).sum())
    return Merged(
        tensor=(base + update).reshape(shape),
        coefficients=eta.tolist(),
        selected=1.0 if chosen is None else float(chosen.mean()) if chosen.size else 0.0,
        erased=1.0 - int(left.sum()) / nonzero if nonzero else 0.0,
    )


def _select(deltas: np.ndarray, select_topk: float) -> np.ndarray | None:
    """bool [entries]: where Select keeps (equation 6); None where everything is kept."""
    if select_topk >= 1 or len(deltas) == 1:
        return None
    variance = deltas.var(axis=0, dtype=np.float32)
    variance[(deltas == deltas[0]).all(axis=0)] = 0  # the mean of equal numbers may differ from them by rounding
    keep = int(select_topk * np.count_nonzero(variance))
    chosen = np.zeros(deltas.shape[1], dtype=bool)
    if keep:
        threshold = np.partition(variance, len(variance) - keep)[len(variance) - keep]
        chosen = variance > threshold
        ties = np.flatnonzero(variance == threshold)
        chosen[ties[: keep - int(chosen.sum())]] = True
    return chosen


def _coefficients(selected: np.ndarray) -> np.ndarray:
    """float64 [targets]: η, the share of each target in the squared updates (equation 7); equal where nothing moved."""
    squares = np.array([np.dot(delta, delta) for delta in selected.astype(np.float64)])
    total = squares.sum()
    return squares / total if total > 0 else np.full(len(selected), 1.0 / len(selected))
