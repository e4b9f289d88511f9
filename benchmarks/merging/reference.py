"""Every method in float64, written down as plainly as it goes, one tensor at a time, and what an output differs from it.

Source: arXiv 2408.07990, Algorithm 1, for SCE; for the methods other than SCE and VaRM what mergekit's parameters mean. Nothing is
rounded but where a difference says so. Nothing of FuseChat is used, except that DARE's random masks are given.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


def reference(
    method: str,
    parameters: dict[str, Any],
    base: np.ndarray,
    targets: list[np.ndarray],
    *,
    weights: list[float],
    masks: list[np.ndarray] | None = None,
) -> np.ndarray:
    """The merged tensor, float64, of `base` and `targets`, float64 of one shape. For `linear` the base is the first input."""
    if method == "linear":
        return sum_of(weights, [base, *targets]) / sum(weights)
    if method == "slerp":
        return slerp(base, targets[0], parameters["t"])
    deltas = [target - base for target in targets]
    if method == "sce":
        return base + sce(deltas, parameters["select_topk"])
    if method == "varm":
        return sum_of(coefficients(deltas), targets)
    if method == "task_arithmetic":
        return base + sum_of(weights, deltas)
    density = parameters["density"]
    if method == "ties":
        deltas = [np.where(largest(abs(delta), max(1, int(density * delta.size))), delta, 0) for delta in deltas]
    else:
        assert masks is not None
        deltas = [thinned(delta, mask) for delta, mask in zip(deltas, masks, strict=True)]
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    if method == "dare_linear":
        return base + sum(weighted)
    left = agreeing(weighted)
    update = sum(np.where(mask, delta, 0) for mask, delta in zip(left, weighted, strict=True))
    if method == "ties":  # normalised by default
        divisor = sum_of(weights, left)
        update = update / np.where(divisor == 0, 1, divisor)
    return base + update


def sce(deltas: list[np.ndarray], select_topk: float) -> np.ndarray:
    """Select, calculate, erase; the sums over what is left at each position."""
    if select_topk < 1 and len(deltas) > 1:
        variance = spread(deltas)
        selected = largest(variance, int(select_topk * np.count_nonzero(variance)))
        deltas = [np.where(selected, delta, 0) for delta in deltas]
    eta = coefficients(deltas)
    left = agreeing(deltas)
    above = sum(np.where(mask, e * delta, 0) for e, mask, delta in zip(eta, left, deltas, strict=True))
    below = sum_of(eta, left)
    return np.divide(above, below, out=np.zeros_like(deltas[0]), where=below > 0)


def spread(deltas: list[np.ndarray]) -> np.ndarray:
    """n² times the population variance, as nΣδ² - (Σδ)²: exact for updates of bfloat16 numbers that are close in size, so that
    what is equal stays equal."""
    return len(deltas) * sum(delta * delta for delta in deltas) - np.square(sum(deltas))


def largest(size: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest are; of equal ones those of lower flat index."""
    chosen = np.zeros(size.size, dtype=bool)
    if count:
        flat = size.reshape(-1)
        last = np.partition(flat, flat.size - count)[flat.size - count]
        chosen = flat > last
        chosen[np.flatnonzero(flat == last)[: count - np.count_nonzero(chosen)]] = True
    return chosen.reshape(size.shape)


def coefficients(deltas: list[np.ndarray]) -> list[float]:
    """Each one's share of all squared updates; equal where there are none."""
    squares = [float(np.square(delta).sum()) for delta in deltas]
    total = sum(squares)
    return [square / total if total > 0 else 1 / len(deltas) for square in squares]


def agreeing(deltas: list[np.ndarray]) -> list[np.ndarray]:
    """Where each is not zero and has the sign of the sum; a sum of zero counts as positive."""
    positive = sum(deltas) >= 0
    return [np.where(positive, delta > 0, delta < 0) for delta in deltas]


def thinned(delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What `mask` keeps, scaled so that the sum of absolute values stays."""
    kept = np.where(mask, delta, 0)
    before, after = abs(delta).sum(), abs(kept).sum()
    return kept * (before / after) if before >= 1e-7 and after >= 1e-7 else kept


def slerp(base: np.ndarray, target: np.ndarray, t: float) -> np.ndarray:
    """Along the great circle; where the two are nearly parallel, along the straight line."""
    lengths = [float(np.sqrt(np.square(each).sum())) for each in (base, target)]
    cosine = float((base * target).sum()) / (lengths[0] * lengths[1]) if min(lengths) > 1e-8 else 0.0
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * target
    angle = np.arccos(cosine)
    return np.sin((1 - t) * angle) / np.sin(angle) * base + np.sin(t * angle) / np.sin(angle) * target


def sum_of(weights: list[float], arrays: list[np.ndarray]) -> np.ndarray:
    total = np.zeros(arrays[0].shape)
    for weight, array in zip(weights, arrays, strict=True):
        total += weight * array
    return total


@dataclass
class Difference:
    """Of stored elements from the reference. `largest`: the largest difference, in the parameters' unit. `beyond`: by how much a
    stored element is farther from the reference than the nearest bfloat16, at most. `not_nearest`: how many elements are not that
    nearest one. `unexplained`: how many are farther from it than float32's rounding on the way can bring them."""

    elements: int = 0
    largest: float = 0.0
    beyond: float = 0.0
    not_nearest: int = 0
    unexplained: int = 0

    def add(self, stored: np.ndarray, expected: np.ndarray, scale: np.ndarray) -> None:
        """All three float64 of one shape; `scale` is the largest absolute value of any input at an element's place."""
        distance = abs(stored - expected)
        least = abs(nearest_bfloat16(expected) - expected)
        self.elements += stored.size
        self.largest = max(self.largest, float(distance.max()))
        self.beyond = max(self.beyond, float((distance - least).max()))
        self.not_nearest += int((distance > least * (1 + 1e-9)).sum())  # of two as near, either one
        self.unexplained += int((distance > least + scale * 2.0**-20).sum())


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """Without the detour over float32, which rounds twice."""
    exponent = np.frexp(values)[1]
    spacing = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    return np.rint(values / spacing) * spacing
