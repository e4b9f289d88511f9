"""Which models' distributions teach, and with what weight. Source: MinCE and AvgCE
of FuseLLM (arXiv 2401.10491) and the paper (arXiv 2408.07990).

Candidates are compared in *groups* of the pivot's rows: all rows of a conversation, those of each response, or each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared

COMPARING = ("mince", "avgce")  # functions by which models are compared; by the others sources teach as they are
FLOOR = 1e-4  # the least probability of a gold token that a kept distribution is credited with


@dataclass(frozen=True)
class SelectionRule:
    """How candidates are compared: the recipe's `fuse.function`, `unit`, `level` and `against`."""

    function: str = "mince"
    unit: str = "byte"
    level: str = "conversation"
    against: str = "pivot"

    @property
    def compares_with_pivot(self) -> bool:
        return self.function in COMPARING and self.against == "pivot"

    @property
    def compares_with_student(self) -> bool:
        return self.function in COMPARING and self.against == "student"


@dataclass(frozen=True)
class Candidate:
    """One model's own rows of a conversation, the nll float32 (nats) of its own tokens there, and its distributions in the
    pivot's tokens, one for each of the pivot's n rows."""

    rows: Prepared
    nll: np.ndarray
    targets: SparseDistribution


def common_responses(candidates: Sequence[Prepared]) -> np.ndarray:
    """int64: the responses that every candidate has; the bytes of one that stripped more are counted as it saw them."""
    return np.arange(min(len(rows.content_bytes) for rows in candidates))


def content_size(rows: Prepared, responses: np.ndarray, unit: str) -> int:
    """Bytes, or own tokens, of the content of `responses`, the end of turn and lead rows left out."""
    if unit == "byte":
        return int(rows.content_bytes[responses].sum())
    return int(np.count_nonzero(counted_rows(rows, responses) & ~rows.lead))


def counted_rows(rows: Prepared, responses: np.ndarray) -> np.ndarray:
    """bool [n]: the rows of `responses` whose nll counts: all but the end of turn. Those before the content, of no bytes and no
    tokens, count as well, for other tokenizers pay for the template's space in the content's first token."""
    found: np.ndarray = ~rows.end_of_turn & np.isin(rows.response, responses)
    return found


def cross_entropy(candidate: Candidate, responses: np.ndarray, unit: str) -> float:
    """Nats per byte, which is fair whatever the tokenizers, or per own token, over the content of `responses`."""
    counted = counted_rows(candidate.rows, responses)
    return float(candidate.nll[counted].astype(np.float64).sum()) / content_size(candidate.rows, responses, unit)


def groups_of(pivot: Prepared, level: str) -> np.ndarray:
    """int64 [n]: the group of each of the pivot's rows, numbered from 0 on."""
    if level == "conversation":
        return np.zeros(len(pivot), dtype=np.int64)
    return pivot.response.astype(np.int64) if level == "response" else np.arange(len(pivot), dtype=np.int64)


def cross_entropies(candidates: Sequence[Candidate], pivot: Prepared, *, unit: str, level: str) -> np.ndarray:
    """float64 [candidates, groups]; infinite where a candidate has nothing to say about a group."""
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
    """float64 [n]: `-log P(gold)` under the kept distributions, P at least `FLOOR`; infinite for a row without any."""
    probability = np.where(targets.ids == gold[:, None], targets.probabilities, 0.0).sum(axis=1)
    empty = (targets.ids < 0).all(axis=1)
    return np.where(empty, np.inf, -np.log(np.maximum(probability, FLOOR)))


def token_sizes(candidates: Sequence[Candidate], pivot: Prepared, *, unit: str, level: str) -> np.ndarray:
    """float64 [groups], or [1] for all: how many units of the cross-entropies a token of the pivot has, by which AvgCE weighs
    them: with `unit: byte` the bytes a token of what is compared. Nats per byte alone are so small that weights would be alike."""
    if unit == "token" or level == "position":
        return np.ones(1)
    if level == "conversation":
        parts = [common_responses([pivot, *(candidate.rows for candidate in candidates)])]
    else:
        parts = [np.array([response]) for response in range(len(pivot.content_bytes))]
    sizes = [(content_size(pivot, part, "byte"), content_size(pivot, part, "token")) for part in parts]
    return np.array([size / max(tokens, 1) for size, tokens in sizes])


def weights(cross_entropies: np.ndarray, function: str, sizes: np.ndarray | float = 1.0) -> np.ndarray:
    """float64 [candidates, groups] from cross-entropies of that shape: `avgce` gives softmax(-sizes · ce), the others all to the
    lowest, of equal ones to the first (the pivot). `sizes` [groups]: see `token_sizes`. A group that no candidate speaks of has
    zeros."""
    lowest = cross_entropies.min(axis=0)
    known = np.isfinite(lowest)
    if function == "avgce":
        share = np.exp(sizes * (np.where(known, lowest, 0.0) - cross_entropies))
        return np.where(known, share / np.where(known, share.sum(axis=0), 1.0), 0.0)
    first = cross_entropies.argmin(axis=0)
    return np.where(known, np.arange(len(cross_entropies))[:, None] == first, 0.0)


def ties(cross_entropies: np.ndarray) -> int:
    """In how many groups more than one candidate has the lowest cross-entropy."""
    lowest = cross_entropies.min(axis=0)
    return int(np.count_nonzero(np.isfinite(lowest) & ((cross_entropies == lowest).sum(axis=0) > 1)))
