"""Which model's distributions a conversation is taught from. Source: METHOD, "Fusion"; the paper's MinCE."""

from dataclasses import dataclass

import numpy as np

from fusechat.core.prepared import Prepared


@dataclass(frozen=True)
class Candidate:
    """One model's rows of a conversation, and the nll float32 [n] (nats) of its own tokens there."""

    rows: Prepared
    nll: np.ndarray


def cross_entropy_per_byte(candidate: Candidate, responses: np.ndarray) -> float:
    """Nats per byte over the content of `responses` (the end of turn left out): fair whatever the tokenizers."""
    counted = ~candidate.rows.end_of_turn & np.isin(candidate.rows.response, responses)
    size = int(candidate.rows.content_bytes[responses].sum())
    return float(candidate.nll[counted].astype(np.float64).sum()) / size


def common_responses(candidates: list[Candidate]) -> np.ndarray:
    """int64: the responses that every candidate has; the bytes of one that stripped more are counted as it saw them."""
    return np.arange(min(len(candidate.rows.content_bytes) for candidate in candidates))


def min_ce(cross_entropies: list[float]) -> tuple[int, bool]:
    """Index of the lowest cross-entropy and whether it was a tie; ties go to the first, which is the pivot."""
    best = min(cross_entropies)
    return cross_entropies.index(best), cross_entropies.count(best) > 1
