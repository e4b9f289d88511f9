"""Means over seeds with 95% intervals, and differences paired by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student_t

from miniature.jobs import Measured, Merged, Place, measured
from miniature.rows import Row

EXACT, BITS = "exact_match", "bits_per_byte"


@dataclass(frozen=True)
class Interval:
    """`half`: half of the width of the 95% interval by Student's t; None where all values are of one model, or there is one."""

    mean: float
    half: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    mean = statistics.fmean(values)
    if len(set(values)) < 2:
        return Interval(mean, None, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, float(student_t.ppf(0.975, len(values) - 1)) * error, len(values))


class Scores:
    """What was measured, by row and seed. `split`: `test` for what is published, `validation` for choosing."""

    def __init__(self, place: Place, split: str) -> None:
        self._place, self._split = place, split

    def of(self, job: Measured | Merged, metric: str, skill: str | None = None) -> float:
        """Of one skill, or the mean over all."""
        found: Any = measured(self._place, job.key(self._place))
        by_skill = found[self._split]
        return float(by_skill[skill][metric]) if skill else statistics.fmean(one[metric] for one in by_skill.values())

    def all(self, row: Row, seeds: int, metric: str, skill: str | None = None) -> list[float]:
        return [self.of(row(seed), metric, skill) for seed in range(seeds)]

    def mean(self, row: Row, seeds: int, metric: str, skill: str | None = None) -> Interval:
        return interval(self.all(row, seeds, metric, skill))

    def difference(self, row: Row, other: Row, seeds: int, metric: str) -> Interval:
        pairs = zip(self.all(row, seeds, metric), self.all(other, seeds, metric), strict=True)
        return interval([left - right for left, right in pairs])
