"""Which models' distributions teach, and with what weight: MinCE and AvgCE (FuseLLM, arXiv 2401.10491; arXiv 2408.07990).

Candidates are compared in *groups* of the pivot's rows: one conversation, one response, or one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared

COMPARING = ("mince", "avgce")  # functions that compare models; with the others sources always teach
FLOOR = 1e-4  # least probability of a gold token under a kept distribution


@dataclass(frozen=True)
class SelectionRule:
    """How candidates are compared: the recipe's `fuse.function`, `unit`, `level` and `against`."""

    function: str = "mince"
    unit: str = "byte"
    level: str = "conversation"
    against: str = "pivot"

    @property
    def compares_with_pivot(self) -> bool:
        """Whether sources teach only where they beat the pivot."""
        return self.function in COMPARING and self.against == "pivot"

    @property
    def compares_with_student(self) -> bool:
        """Whether sources teach only where they beat the student at each step."""
        return self.function in COMPARING and self.against == "student"


@dataclass(frozen=True)
class Candidate:
    """One model's rows of a conversation, the nll of its own tokens there (float32, nats), and its distributions over pivot
    tokens, one for each of the pivot's n rows."""

    rows: Prepared
    nll: np.ndarray
    targets: SparseDistribution


def common_responses(candidates: Sequence[Prepared]) -> np.ndarray:
    """int64: the responses that every candidate has. A candidate's bytes of a response are counted as it sees them."""
    return np.arange(min(len(rows.content_bytes) for rows in candidates))


def content_size(rows: Prepared, responses: np.ndarray, unit: str) -> int:
    """The content of `responses` in bytes, or in the model's own tokens, without end of turn and lead rows."""
    if unit == "byte":
        return int(rows.content_bytes[responses].sum())
    return int(np.count_nonzero(counted_rows(rows, responses) & ~rows.lead))


def counted_rows(rows: Prepared, responses: np.ndarray) -> np.ndarray:
    """bool [n]: the rows of `responses` whose nll counts: all but the end of turn. Lead rows count, although they add no bytes
    and no tokens: other tokenizers have the template's space in the first token."""
    found: np.ndarray = ~rows.end_of_turn & np.isin(rows.response, responses)
    return found


def cross_entropy(candidate: Candidate, responses: np.ndarray, unit: str) -> float:
    """Nats per byte (comparable across tokenizers) or per own token, over the content of `responses`."""
    counted = counted_rows(candidate.rows, responses)
    return float(candidate.nll[counted].astype(np.float64).sum()) / content_size(candidate.rows, responses, unit)


def groups_of(pivot: Prepared, level: str) -> np.ndarray:
    """int64 [n]: the group of each pivot row, numbered from 0."""
    if level == "conversation":
        return np.zeros(len(pivot), dtype=np.int64)
    return pivot.response.astype(np.int64) if level == "response" else np.arange(len(pivot), dtype=np.int64)


def cross_entropies(candidates: Sequence[Candidate], pivot: Prepared, *, unit: str, level: str) -> np.ndarray:
    """float64 [candidates, groups]: nats per unit, infinite if a candidate has nothing for a group."""
    if level == "position":
        return np.stack([position_cross_entropy(candidate.targets, pivot.gold) for candidate in candidates])
    if level == "conversation":
        common = common_responses([pivot, *(candidate.rows for candidate in candidates)])
        return np.array([[cross_entropy(candidate, common, unit)] for candidate in candidates])
    found = np.full((len(candidates), len(pivot.content_bytes)), np.inf)
    for index, candidate in enumerate(candidates):
        for response in range(min(len(candidate.rows.content_bytes), found.shape[1])):
            found[index, response] = cross_entropy(candidate, np.array([response]), unit)
    return found


def position_cross_entropy(targets: SparseDistribution, gold: np.ndarray) -> np.ndarray:
    """float64 [n]: `-log P(gold)` (nats) under the kept distributions, P at least `FLOOR`; infinite in rows without any."""
    probability = np.where(targets.ids == gold[:, None], targets.probabilities, 0.0).sum(axis=1)
    empty = (targets.ids < 0).all(axis=1)
    return np.where(empty, np.inf, -np.log(np.maximum(probability, FLOOR)))


def token_sizes(candidates: Sequence[Candidate], pivot: Prepared, *, unit: str, level: str) -> np.ndarray:
    """float64 [groups], or [1] for all: units per pivot token, by which AvgCE multiplies cross-entropies. With `unit: byte`
    these are the bytes per token of what is compared. Nats per byte are so small that all weights would be alike."""
    if unit == "token" or level == "position":
        return np.ones(1)
    if level == "conversation":
        parts = [common_responses([pivot, *(candidate.rows for candidate in candidates)])]
    else:
        parts = [np.array([response]) for response in range(len(pivot.content_bytes))]
    sizes = [(content_size(pivot, part, "byte"), content_size(pivot, part, "token")) for part in parts]
    return np.array([size / max(tokens, 1) for size, tokens in sizes])


def weights(cross_entropies: np.ndarray, function: str, sizes: np.ndarray | float = 1.0) -> np.ndarray:
    """float64 [candidates, groups] from cross-entropies of that shape.

    `avgce` is softmax(-sizes · ce) over the candidates; the other functions give weight 1 to the lowest, the first of equals
    (the pivot). `sizes` [groups]: see `token_sizes`. Groups without any candidate have zeros.
    """
    lowest = cross_entropies.min(axis=0)
    known = np.isfinite(lowest)
    if function == "avgce":
        share = np.exp(sizes * (np.where(known, lowest, 0.0) - cross_entropies))
        return np.where(known, share / np.where(known, share.sum(axis=0), 1.0), 0.0)
    first = cross_entropies.argmin(axis=0)
    return np.where(known, np.arange(len(cross_entropies))[:, None] == first, 0.0)


def ties(cross_entropies: np.ndarray) -> int:
    """The number of groups where several candidates have the lowest cross-entropy."""
    lowest = cross_entropies.min(axis=0)
    return int(np.count_nonzero(np.isfinite(lowest) & ((cross_entropies == lowest).sum(axis=0) > 1)))
