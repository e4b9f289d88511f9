"""Merging methods as their papers write them, on whole tensors: float64, and exact integers where something is decided."""

import math
from collections.abc import Sequence

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def updates(base: torch.Tensor, targets: Sequence[torch.Tensor]) -> np.ndarray:
    """float64 [targets, elements], from the subtraction in float32."""
    return np.stack([(target.float() - base.float()).double().numpy().ravel() for target in targets])


def exact(values: np.ndarray) -> np.ndarray:
    """Whole numbers, each 2¹⁴⁹ times a float32."""
    return np.array([int(math.ldexp(value, 149)) for value in values.ravel()], object).reshape(values.shape)


def largest(keys: np.ndarray, count: int) -> np.ndarray:
    """bool: the `count` largest keys, of equal ones those that come first."""
    order = sorted(range(keys.size), key=lambda i: (-keys[i], i))[:count]
    chosen = np.zeros(keys.size, bool)
    chosen[order] = True
    return chosen


def select(deltas: np.ndarray, share: float) -> np.ndarray:
    """bool [elements] by equation 6: the variance's numerator decides."""
    whole = exact(deltas)
    variances = len(deltas) * (whole * whole).sum(axis=0) - whole.sum(axis=0) ** 2
    return largest(variances, int(share * np.count_nonzero(variances))) if share < 1 else np.ones(len(variances), bool)


def sce(base: torch.Tensor, targets: Sequence[torch.Tensor], share: float, eta: np.ndarray) -> torch.Tensor:
    """Equations 6, 8 and 9 with coefficients as given."""
    deltas = updates(base, targets) * select(updates(base, targets), share)
    positive = exact(deltas).sum(axis=0) >= 0
    left = np.where(positive, deltas > 0, deltas < 0)
    weight = (eta[:, None] * left).sum(axis=0)
    update = (eta[:, None] * left * deltas).sum(axis=0) / np.where(weight > 0, weight, 1)
    return base.double() + torch.from_numpy(update).reshape(base.shape)


def squares(base: torch.Tensor, targets: Sequence[torch.Tensor], share: float) -> np.ndarray:
    """float64 [targets]: the squared updates at selected positions."""
    deltas = updates(base, targets)
    return ((deltas * select(deltas, share)) ** 2).sum(axis=1)


def shares(sums: np.ndarray) -> np.ndarray:
    return sums / sums.sum() if sums.sum() else np.full(len(sums), 1 / len(sums))


def ties(base: torch.Tensor, targets: Sequence[torch.Tensor], density: float, weights: Sequence[float]) -> torch.Tensor:
    deltas = updates(base, targets)
    count = max(1, int(density * deltas.shape[1]))
    deltas *= np.stack([largest(np.abs(delta), count) for delta in deltas])
    weighted = np.float32(weights)[:, None].astype(float) * deltas
    agreeing = np.where(weighted.sum(axis=0) >= 0, weighted > 0, weighted < 0)
    total = (np.array(weights)[:, None] * agreeing).sum(axis=0)
    update = (weighted * agreeing).sum(axis=0) / np.where(total, total, 1)
    return base.double() + torch.from_numpy(update).reshape(base.shape)


def slerp(base: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    one, two = base.double(), other.double()
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * two
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)
