"""Counts of an alignment (covered, dropped, backed off), for the manifest and the report."""

from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np

from fusechat.align.back_off import ORIGINS
from fusechat.align.candidates import Candidates
from fusechat.align.sequence import Alignment
from fusechat.align.transfer import Transferred
from fusechat.align.vocabulary import VocabularyMap


@dataclass
class AlignmentStats:
    """Sums over conversations. `summary` turns them into shares."""

    conversations: int = 0
    without_source: int = 0  # conversations that the source rejected: none of their rows is aligned
    positions: int = 0
    aligned: int = 0
    clipped: int = 0
    inside: int = 0  # pivot tokens that start inside a source token
    conditioned: int = 0  # of these, those with a distribution
    chained: int = 0  # pivot tokens with a probability by the chain rule
    improbable_boundaries: int = 0  # aligned, where the source rarely ends a token
    empty: int = 0  # aligned, but no candidate corresponds to a pivot token
    little: int = 0  # aligned or conditioned, but with too little mass for a target
    mapped_mass: float = 0.0
    kept_mass: float = 0.0
    lead: int = 0  # tokens before the content, in no other count
    lead_aligned: int = 0
    mass_by_origin: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        alignment: Alignment,
        candidates: Candidates,
        result: Transferred,
        vocabulary_map: VocabularyMap,
        *,
        little: np.ndarray,
    ) -> None:
        """Adds a conversation. `little` bool [n_pivot]: rows with too little mass for a target."""
        aligned = alignment.aligned
        conditioned = alignment.inside & (result.mapped > 0)
        covered = (aligned | conditioned) & ~little
        self.little += int(little.sum())
        self.positions += int((~alignment.lead).sum())
        self.lead += int(alignment.lead.sum())
        self.lead_aligned += int((alignment.lead & (alignment.source_row >= 0)).sum())
        self.aligned += int(aligned.sum())
        self.clipped += int((aligned & ~alignment.unclipped).sum())
        self.inside += int(alignment.inside.sum())
        self.conditioned += int(conditioned.sum())
        self.chained += int((candidates.own & ~np.isnan(candidates.chained) & ~alignment.lead).sum())
        self.empty += int((aligned & (result.rows.ids < 0).all(axis=1)).sum())
        self.mapped_mass += float(result.mapped[covered].sum())
        self.kept_mass += float((1.0 - result.rows.tail)[covered].sum())
        real = (candidates.row >= 0) & ~alignment.lead[:, None]
        sums = np.bincount(vocabulary_map.origin[candidates.row[real]], candidates.mass[real], minlength=len(ORIGINS))
        self.mass_by_origin.update({name: mass for name, mass in zip(ORIGINS, sums.tolist(), strict=True) if mass})

    def add_without_source(self, positions: int, lead: int = 0) -> None:
        """Adds a conversation that the source rejected: its content rows and its lead rows."""
        self.without_source += 1
        self.conversations += 1
        self.positions += positions
        self.lead += lead

    def summary(self) -> dict[str, object]:
        """Counts and shares by name; a share is None if its denominator is 0."""
        captured = sum(self.mass_by_origin.values())
        covered = self.aligned + self.conditioned - self.little
        return {
            "conversations": self.conversations,
            "conversations_without_source": self.without_source,
            "positions": self.positions,
            "positions_aligned": self.aligned,
            "positions_clipped": self.clipped,
            "positions_inside_a_source_token": self.inside,
            "positions_conditioned": self.conditioned,
            "positions_by_the_chain_rule": self.chained,
            "positions_where_the_source_rarely_cuts": self.improbable_boundaries,
            "positions_without_candidate": self.empty,
            "positions_of_little_mass": self.little,
            "lead_positions": self.lead,
            "lead_positions_aligned": self.lead_aligned,
            "coverage_of_positions": _share(covered, self.positions),
            "coverage_of_mass": _share(self.mapped_mass, covered),
            "kept_mass": _share(self.kept_mass, covered),
            "mass_by_origin": {kind: _share(mass, captured) for kind, mass in sorted(self.mass_by_origin.items())},
        }


def add_figures(total: AlignmentStats, part: AlignmentStats) -> None:
    """Adds `part` to `total`."""
    for each in fields(AlignmentStats):
        if each.name == "mass_by_origin":
            total.mass_by_origin.update(part.mass_by_origin)
        else:
            setattr(total, each.name, getattr(total, each.name) + getattr(part, each.name))


def _share(part: float, whole: float) -> float | None:
    """None if `whole` is 0: undefined is not zero."""
    return round(part / whole, 6) if whole else None
