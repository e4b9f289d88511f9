"""A metric as a ratio of sums over items, with its standard error, and the paired difference of two models on the same items.

An item is what was drawn independently: a question with both its turns, a conversation with all its responses. Bits per byte
is Σ bits / Σ bytes over conversations, a mean score Σ score / Σ judgements over questions; both are the same estimator, whose
standard error comes from its linearisation (W. G. Cochran, Sampling Techniques, 1977, equation 6.13): exact for a mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Items = Mapping[str, tuple[float, float]]  # item → (sum, weight)


@dataclass(frozen=True)
class Estimate:
    """`value` is None without any weight, `standard_error` without a second item; `n` items."""

    value: float | None
    standard_error: float | None
    n: int


def ratio(items: Items) -> Estimate:
    """Σ sum / Σ weight. Items of no weight say nothing and are not counted."""
    kept = {name: pair for name, pair in items.items() if pair[1]}
    influence = _influence(kept)
    if influence is None:
        return Estimate(None, None, len(kept))
    total, weight = _sums(kept)
    return Estimate(total / weight, _standard_error(list(influence.values())), len(kept))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share: unlike one from a standard error, it has a width where all or none succeed (E. B. Wilson,
    Probable inference, the law of succession, and statistical inference, 1927)."""
    z = 1.959964
    centre, spread = successes + z * z / 2, z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def paired_difference(one: Items, other: Items) -> Estimate:
    """`one` minus `other`, over the items that both have: what is hard in an item is hard for both, and drops out."""
    common = [name for name, pair in one.items() if pair[1] and other.get(name, (0, 0))[1]]
    ours, theirs = {name: one[name] for name in common}, {name: other[name] for name in common}
    first, second = _influence(ours), _influence(theirs)
    if first is None or second is None:
        return Estimate(None, None, len(common))
    difference = _ratio(ours) - _ratio(theirs)
    return Estimate(difference, _standard_error([first[name] - second[name] for name in common]), len(common))


def _influence(items: Items) -> dict[str, float] | None:
    """How much each item moves the ratio; they sum to 0. None where there is nothing to divide by."""
    if not items or not _sums(items)[1]:
        return None
    weight, value = _sums(items)[1], _ratio(items)
    return {name: (part - value * share) / weight for name, (part, share) in items.items()}


def _standard_error(influence: Sequence[float]) -> float | None:
    n = len(influence)
    return math.sqrt(n / (n - 1) * math.fsum(one * one for one in influence)) if n > 1 else None


def _ratio(items: Items) -> float:
    total, weight = _sums(items)
    return total / weight


def _sums(items: Items) -> tuple[float, float]:
    return math.fsum(pair[0] for pair in items.values()), math.fsum(pair[1] for pair in items.values())
