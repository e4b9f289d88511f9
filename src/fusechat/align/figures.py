"""What an alignment covered, dropped and fell back on: counts that go to the manifest and the report."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fusechat.align.sequence import Alignment
from fusechat.align.transfer import Transferred
from fusechat.align.vocabulary import VocabularyMap


@dataclass
class Figures:
    """Sums over conversations; `summary` turns them into shares."""

    conversations: int = 0
    without_source: int = 0  # conversations that the source rejected: no row of them is aligned
    positions: int = 0
    aligned: int = 0
    clipped: int = 0
    empty: int = 0  # aligned, but no candidate corresponds to a pivot token
    mapped_mass: float = 0.0
    kept_mass: float = 0.0
    mass_by_origin: Counter[str] = field(default_factory=Counter)

    def add(self, alignment: Alignment, result: Transferred) -> None:
        aligned = alignment.source_row >= 0
        self.conversations += 1
        self.positions += len(aligned)
        self.aligned += int(aligned.sum())
        self.clipped += int((aligned & ~alignment.unclipped).sum())
        self.empty += int((aligned & (result.rows.ids < 0).all(axis=1)).sum())
        self.mapped_mass += float(result.mapped[aligned].sum())
        self.kept_mass += float((1.0 - result.tail)[aligned].sum())

    def add_origins(self, candidates: np.ndarray, mass: np.ndarray, vocabulary_map: VocabularyMap) -> None:
        """Captured mass by where its row of W comes from."""
        kinds, code = vocabulary_map.origins
        sums = np.bincount(code[vocabulary_map.rows_of(candidates)], weights=mass, minlength=len(kinds))
        self.mass_by_origin.update(dict(zip(kinds, sums.tolist(), strict=True)))

    def summary(self) -> dict[str, object]:
        captured = sum(self.mass_by_origin.values())
        return {
            "conversations": self.conversations,
            "conversations_without_source": self.without_source,
            "positions": self.positions,
            "positions_aligned": self.aligned,
            "positions_clipped": self.clipped,
            "positions_without_candidate": self.empty,
            "coverage_of_positions": _share(self.aligned, self.positions),
            "coverage_of_mass": _share(self.mapped_mass, self.aligned),
            "kept_mass": _share(self.kept_mass, self.aligned),
            "mass_by_origin": {kind: _share(mass, captured) for kind, mass in sorted(self.mass_by_origin.items())},
        }


def _share(part: float, whole: float) -> float | None:
    """None where there is nothing to have a share of: undefined is not zero."""
    return round(part / whole, 6) if whole else None
