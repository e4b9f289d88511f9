"""Sources compared with the student as it is at each step. See docs/training.md, `fuse.against: student`.

The student's cross-entropy of a group comes from the nll that the loss has anyway; the fusion term counts only where the
best source's is lower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusechat.data.prepared import Prepared
from fusechat.fuse.teacher_selection import FLOOR, SelectionRule, common_responses, counted_rows, groups_of


@dataclass(frozen=True)
class Comparison:
    """What a conversation's n rows, in g groups, need to be compared: `groups` int64 [n]; `counted` bool [n], the rows of which
    the student's cross-entropy is taken; `size` float32 [g], what it is divided by (bytes or tokens); `best_source_ce` float32 [g];
    `chosen` int64 [g], which candidate that is."""

    groups: np.ndarray
    counted: np.ndarray
    size: np.ndarray
    best_source_ce: np.ndarray
    chosen: np.ndarray

    @classmethod
    def of(
        cls,
        pivot: Prepared,
        sources: Sequence[Prepared],
        rule: SelectionRule,
        *,
        best_source_ce: np.ndarray,
        chosen: np.ndarray,
    ) -> "Comparison":
        """Of the pivot's rows with the sources that have the conversation; see `chosen` and `best_source_ce` above."""
        groups = groups_of(pivot, rule.level)
        if rule.level == "position":
            counted, units = np.ones(len(pivot), bool), np.ones(len(pivot))
        else:
            every = [pivot, *sources]
            responses = common_responses(every) if rule.level == "conversation" else np.arange(len(pivot.content_bytes))
            counted = counted_rows(pivot, responses)
            by_response = pivot.content_bytes[responses].astype(np.float64)
            if rule.unit == "token":
                units = np.bincount(groups[counted & ~pivot.lead], minlength=len(best_source_ce)).astype(np.float64)
            else:
                units = by_response if rule.level == "response" else by_response.sum(keepdims=True)
        return cls(
            groups, counted, units.astype(np.float32), best_source_ce.astype(np.float32), chosen.astype(np.int64)
        )

    @classmethod
    def without_sources(cls, pivot: Prepared, rule: SelectionRule) -> "Comparison":
        """Of a conversation that no source speaks of; of one without rows, no group at all."""
        number = len(np.unique(groups_of(pivot, rule.level))) if len(pivot) else 0
        if not number:
            return cls(*(np.zeros(0, kind) for kind in (np.int64, bool, np.float32, np.float32, np.int64)))
        return cls.of(pivot, [], rule, best_source_ce=np.full(number, np.inf), chosen=np.zeros(number))


def join_comparisons(parts: Sequence[Comparison], sets: Sequence[int]) -> dict[str, torch.Tensor]:
    """The comparisons of a batch as tensors, their groups numbered through. Beside the fields of `Comparison`, `set` int64 [g]."""
    fields: dict[str, list[np.ndarray]] = {
        name: [] for name in ("groups", "counted", "size", "best_source_ce", "chosen", "set")
    }
    first = 0
    for part, place in zip(parts, sets, strict=True):
        for name in ("counted", "size", "best_source_ce", "chosen"):
            fields[name].append(getattr(part, name))
        fields["groups"].append(part.groups + first)
        fields["set"].append(np.full(len(part.best_source_ce), place, np.int64))
        first += len(part.best_source_ce)
    return {name: torch.from_numpy(np.concatenate(columns)) for name, columns in fields.items()}


def source_is_better(nll: torch.Tensor, comparison: dict[str, torch.Tensor], *, level: str) -> torch.Tensor:
    """bool [g]: where the best source's cross-entropy is below the student's, from the student's nll [n] (nats).

    Of single positions a probability counts as `FLOOR` at least, as the sources' does.
    """
    nll = nll.detach().to(comparison["best_source_ce"].dtype)
    if level == "position":
        nll = nll.clamp(max=-math.log(FLOOR))
    own = torch.where(comparison["counted"], nll, 0.0)
    summed = torch.zeros_like(comparison["best_source_ce"]).index_add(0, comparison["groups"], own)
    return comparison["best_source_ce"] < summed / comparison["size"].clamp(min=1.0)
