"""Quality of an alignment: transferred nll compared with the source's own, and coverage. See docs/alignment.md.

The transferred nll is the cross-entropy of the gold pivot tokens under the stored distributions, at p = 1e-4 for tokens that
were not kept. It is compared with the source's own nll of the same bytes: the text is cut where both models start a token, and
a *segment* between two cuts counts if every pivot token in it has a distribution.
"""

from dataclasses import dataclass

import numpy as np

from fusechat.align.sequence import number_line
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared

FLOOR = 1e-4  # probability of a gold token that was not kept


@dataclass
class Quality:
    """Sums over conversations, in nats and bytes. `summary` turns them into bits per byte."""

    positions: int = 0
    covered: int = 0
    little: int = 0
    mapped: float = 0.0
    common_nll: float = 0.0  # transferred, on positions that all strategies cover
    common_bytes: int = 0
    segment_nll: float = 0.0  # transferred, on covered segments
    segment_own: float = 0.0
    segment_own_kept: float = 0.0  # the source's own, from its k kept tokens and the same floor
    segment_bytes: int = 0
    bytes: int = 0
    own: float = 0.0  # the source's, on everything
    rare: int = 0
    rare_nll: float = 0.0  # transferred, where the source rarely ends a token

    def add(
        self,
        pivot: Prepared,
        source: Prepared,
        captured: SparseDistribution,
        *,
        rows: SparseDistribution,
        mapped: np.ndarray,
        covered: np.ndarray,
        little: np.ndarray,
        common: np.ndarray,
        rare: np.ndarray,
    ) -> None:
        """Adds a conversation: the stored `rows` [n_pivot, k] and their `mapped` mass, float64 [n_pivot].

        bool [n_pivot] each: rows that are `covered`; that have too `little` mass; that all strategies cover (`common`); where
        the source rarely ends a token (`rare`).
        """
        nll = gold_nll(rows, pivot.gold)
        content = _content(pivot)
        width = (pivot.end - np.maximum(pivot.begin, 0)).astype(np.int64)
        self.positions += int((~pivot.lead).sum())
        self.covered += int(covered.sum())
        self.little += int(little.sum())
        self.mapped += float(mapped[covered].sum())
        both = common & content
        self.common_nll += float(nll[both].sum())
        self.common_bytes += int(width[both].sum())
        self.rare += int((rare & content).sum())
        self.rare_nll += float(nll[rare & content].sum())
        own_content = _content(source)
        self.own += float(captured.nll[~source.end_of_turn].sum(dtype=np.float64))
        self.bytes += int((source.end - np.maximum(source.begin, 0))[own_content].sum())
        ours, theirs = covered_segments(pivot, source, covered)
        own_kept = gold_nll(captured, source.gold)
        self.segment_nll += float(nll[ours].sum())
        self.segment_own += float(captured.nll[theirs].sum(dtype=np.float64))
        self.segment_own_kept += float(own_kept[theirs].sum())
        self.segment_bytes += int(width[ours].sum())

    def summary(self) -> dict[str, float | None]:
        """Bits per byte and shares by name, or None if the denominator is 0."""
        return {
            "coverage_of_positions": _ratio(self.covered, self.positions),
            "coverage_of_mass": _ratio(self.mapped, self.covered),
            "little_mass": _ratio(self.little, self.positions),
            "coverage_of_bytes": _ratio(self.segment_bytes, self.bytes),
            "own": _bits(self.own, self.bytes),
            "common": _bits(self.common_nll, self.common_bytes),
            "transferred": _bits(self.segment_nll, self.segment_bytes),
            "own_there": _bits(self.segment_own, self.segment_bytes),
            "own_kept_there": _bits(self.segment_own_kept, self.segment_bytes),
            "ratio": _ratio(self.segment_nll, self.segment_own),
            "ratio_to_kept": _ratio(self.segment_nll, self.segment_own_kept),
            "rarely_cut": _ratio(self.rare, self.positions),
            "nats_where_rarely_cut": _ratio(self.rare_nll, self.rare),
        }


def gold_nll(rows: SparseDistribution, gold: np.ndarray) -> np.ndarray:
    """float64 [n]: `-log p` (nats) of the gold tokens under stored distributions, `-log FLOOR` for those that were not kept."""
    found = (rows.ids == gold[:, None]) & (rows.ids >= 0)
    probability = np.where(found, rows.probabilities, 0.0).sum(axis=1)
    return np.asarray(-np.log(np.clip(probability, FLOOR, 1.0)))


def covered_segments(pivot: Prepared, source: Prepared, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Content rows in a covered segment, of the pivot and of the source: bool [n_pivot], [n_source]."""
    ours, theirs = number_line(pivot, source)
    own, other = _content(pivot), _content(source)
    common = np.intersect1d(ours[own, 0], theirs[other, 0])
    cuts = np.union1d(common, np.append(_response_starts(pivot, ours), _response_starts(source, theirs)))
    segment, segment_there = (np.searchsorted(cuts, spans[:, 0], side="right") - 1 for spans in (ours, theirs))
    lacking = ~np.isin(cuts, common)  # one side's alone: a response that the other lost, or its first bytes
    lacking[segment[own & ~covered]] = True
    # A row of width 0 (a dummy prefix) has nll too: it counts with the token after it.
    return own & ~lacking[segment], ~source.end_of_turn & ~source.lead & ~lacking[segment_there]


def _response_starts(rows: Prepared, spans: np.ndarray) -> np.ndarray:
    """The start of each row's response on the number line."""
    return np.asarray((spans[:, 0] - np.maximum(rows.begin, 0))[~rows.end_of_turn])


def _content(rows: Prepared) -> np.ndarray:
    return np.asarray(~rows.end_of_turn & ~rows.lead & (rows.end > np.maximum(rows.begin, 0)))


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


def _bits(nats: float, size: int) -> float | None:
    return round(nats / np.log(2) / size, 6) if size else None
