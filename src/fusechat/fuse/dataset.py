"""What the trainer reads: tokens of a conversation, its response rows, and the k targets of each row."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fusechat.core.distributions import DistributionSet, SparseDistribution
from fusechat.core.forward import collate
from fusechat.core.prepared import PreparedSet
from fusechat.fuse.choice import Candidate, common_responses, cross_entropy_per_byte, min_ce

PIVOT, SOURCE, NONE = "pivot", "source", "none"


class FusionData(Dataset[dict[str, Any]]):
    """The conversations of one target. `chosen` maps a conversation's id to the model that teaches it (METHOD, "Fusion")."""

    def __init__(
        self,
        pivot: PreparedSet,
        source: PreparedSet,
        *,
        pivot_captured: DistributionSet,
        source_captured: DistributionSet,
        aligned: DistributionSet,
    ) -> None:
        self.pivot, self.aligned, self.pivot_captured = pivot, aligned, pivot_captured
        self.counts = Counter(
            {"taught_by_pivot": 0, "taught_by_source": 0, "taught_by_none": 0, "ties": 0, "without_comparison": 0}
        )
        self.chosen = {identity: self._choose(identity, source, source_captured) for identity in pivot.ids}

    def __len__(self) -> int:
        return len(self.pivot)

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation = self.pivot[index]
        targets = self._targets(conversation.id, len(conversation))
        return {"input_ids": conversation.input_ids, "conversation": conversation, "targets": targets}

    def _targets(self, identity: str, n: int) -> SparseDistribution:
        teacher = self.chosen[identity]
        if teacher == SOURCE:
            return self.aligned[identity]
        if teacher == PIVOT:
            return self.pivot_captured[identity]
        return SparseDistribution(np.full((n, 1), -1, np.int32), np.full((n, 1), -np.inf), np.zeros(0, np.float32))

    def _choose(self, identity: str, source: PreparedSet, source_captured: DistributionSet) -> str:
        """MinCE between the pivot and the source; where only one of them has the conversation, that one; counted."""
        has_pivot = identity in self.pivot_captured
        has_source = identity in source.row_of and identity in source_captured
        if has_pivot and has_source:
            candidates = [
                Candidate(self.pivot[self.pivot.row_of[identity]], self.pivot_captured[identity].nll),
                Candidate(source[source.row_of[identity]], source_captured[identity].nll),
            ]
            common = common_responses(candidates)
            best, tie = min_ce([cross_entropy_per_byte(candidate, common) for candidate in candidates])
            self.counts["ties"] += tie
            teacher = (PIVOT, SOURCE)[best]
        else:
            teacher = PIVOT if has_pivot else SOURCE if has_source else NONE
            self.counts["without_comparison"] += 1
        self.counts[f"taught_by_{teacher}"] += 1
        return teacher


def collate_fusion(items: Sequence[dict[str, Any]], *, pad: int) -> dict[str, Any]:
    """A batch for the trainer: padded tokens, and for the n response rows of all items together `labels` int64 [n],
    `target_ids` int64 [n, k] (-1 pads), `target_logprobs` float32 [n, k]."""
    conversations = [item["conversation"] for item in items]
    batch = collate(conversations, pad)
    k = max(item["targets"].ids.shape[1] for item in items)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "rows": batch.rows,
        "labels": batch.input_ids[batch.rows[:, 0], batch.rows[:, 1]],
        "target_ids": _stack([item["targets"].ids for item in items], k, -1, torch.long),
        "target_logprobs": _stack([item["targets"].logprobs for item in items], k, -np.inf, torch.float32),
        "conversation_ids": [conversation.id for conversation in conversations],
    }


def _stack(parts: list[np.ndarray], k: int, fill: float, dtype: torch.dtype) -> torch.Tensor:
    padded = [np.pad(part, ((0, 0), (0, k - part.shape[1])), constant_values=fill) for part in parts]
    return torch.from_numpy(np.concatenate(padded)).to(dtype)
