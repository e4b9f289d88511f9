"""How wide a 95% interval is: Student's t, whose standard error is estimated from the same few items as the mean."""

import math
from functools import lru_cache

import numpy as np

NORMAL = 1.959964  # standard errors, where it is not known of how many items, or of so many that it makes no difference
_LEVEL, _MANY = 0.95, 100_000


@lru_cache(maxsize=256)
def half_width(items: int | None) -> float:
    """Standard errors in half of the 95% interval of a mean, or of a ratio of sums, over so many independent items: with 20 of them
    2.093, with 5 2.776."""
    if items is None or items < 2 or items > _MANY:
        return NORMAL
    freedom = items - 1
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < _LEVEL else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def half_interval(error: float | None, items: int | None) -> float | None:
    """Half of the 95% interval by a standard error over so many items; None without a standard error."""
    return None if error is None else half_width(items) * error


def is_better(difference: float, half: float | None, higher_is_better: bool | None) -> bool | None:
    """Whether a difference is one for the better. None where its interval, `half` to each side, has 0 in it, where it has no
    interval, and for a metric that is better neither way."""
    if half is None or higher_is_better is None or not abs(difference) > half:
        return None
    return (difference > 0) == higher_is_better


def _inside(theta: float, freedom: int) -> float:
    """The probability that |t| is at most sqrt(freedom) * tan(theta), as a finite sum (Abramowitz and Stegun, Mathematical
    Functions, 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    if freedom == 1:
        return 2 * theta / math.pi
    place = np.arange(1, (freedom - 1) // 2 if freedom % 2 else freedom // 2)
    if freedom % 2:
        terms = 1 + float(np.cumprod(2 * place / (2 * place + 1) * cosine**2).sum())
        return 2 / math.pi * (theta + sine * cosine * terms)
    return sine * (1 + float(np.cumprod((2 * place - 1) / (2 * place) * cosine**2).sum()))
