"""Compares sources with the student at each step (`fuse.against: student`). See docs/training.md.

The student's cross-entropy of a group comes from the nll that the loss computes anyway. The fusion term counts only where the
best source's cross-entropy is lower.
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
    """The data to compare g groups of a conversation's n rows with the student.

    `groups` int64 [n]; `counted` bool [n], the rows in the student's cross-entropy; `size` float32 [g], its divisor (bytes or
    tokens); `best_source_ce` float32 [g], nats per unit; `chosen` int64 [g], the candidate that has it.
    """

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
        """The comparison of the pivot's rows with the sources that have the conversation."""
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
        """The comparison of a conversation that no source has; without rows it has no groups."""
        number = len(np.unique(groups_of(pivot, rule.level))) if len(pivot) else 0
        if not number:
            return cls(*(np.zeros(0, kind) for kind in (np.int64, bool, np.float32, np.float32, np.int64)))
        return cls.of(pivot, [], rule, best_source_ce=np.full(number, np.inf), chosen=np.zeros(number))


def join_comparisons(parts: Sequence[Comparison], sets: Sequence[int]) -> dict[str, torch.Tensor]:
    """Joins the comparisons of a batch as tensors, with groups numbered consecutively. Adds `set` int64 [g]."""
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
    """bool [g]: groups where the best source's cross-entropy is below the student's, from the student's nll [n] (nats). At
    `level: position` the student's probability is at least `FLOOR`, as the sources' is."""
    nll = nll.detach().to(comparison["best_source_ce"].dtype)
    if level == "position":
        nll = nll.clamp(max=-math.log(FLOOR))
    own = torch.where(comparison["counted"], nll, 0.0)
    summed = torch.zeros_like(comparison["best_source_ce"]).index_add(0, comparison["groups"], own)
    return comparison["best_source_ce"] < summed / comparison["size"].clamp(min=1.0)
