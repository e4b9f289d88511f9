"""The training data: a conversation's tokens, its response rows, and the k targets of each row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fusechat.data.distributions import DistributionSet, SparseDistribution, nothing
from fusechat.data.prepared import Prepared, PreparedSet
from fusechat.fuse import teacher_selection
from fusechat.fuse.epochs import epoch_members, epoch_size
from fusechat.fuse.mixture import mix
from fusechat.fuse.student import Comparison, join_comparisons
from fusechat.fuse.teacher_selection import Candidate, SelectionRule
from fusechat.models.forward import collate

PIVOT, NONE, TIES, SINGLE_CANDIDATE = "pivot", "none", "ties", "without comparison"
PAD_INDEX = -1  # the index of an empty item that fills up a batch


@dataclass(frozen=True)
class Teacher:
    """A source's data of one set of conversations: its rows, its captured distributions, and these aligned to the pivot's rows."""

    prepared: PreparedSet
    captured: DistributionSet
    aligned: DistributionSet


@dataclass(frozen=True)
class TeachingSet:
    """A set of conversations and its teachers. `captured`: the pivot's own distributions, if needed. `weight`: how often each
    conversation is in an epoch."""

    name: str
    pivot: PreparedSet
    captured: DistributionSet | None = None
    teachers: Mapping[str, Teacher] | None = None
    weight: float = 1.0


class FusionData(Dataset[dict[str, Any]]):
    """The conversations of one target, set after set, each once, in its first set."""

    def __init__(self, sets: Sequence[TeachingSet], rule: SelectionRule) -> None:
        self.sets, self.rule = list(sets), rule
        self.candidates = [PIVOT, *dict.fromkeys(name for one in sets for name in one.teachers or {})]
        seen: set[str] = set()
        self.places: list[tuple[int, int]] = []  # (set, row) of each conversation
        for index, one in enumerate(sets):
            new = [row for row, identity in enumerate(one.pivot.ids) if identity not in seen]
            seen.update(one.pivot.ids)
            self.places += [(index, row) for row in new]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def is_weighted(self) -> bool:
        """Whether any set has another weight than 1."""
        return any(one.weight != 1 for one in self.sets)

    @property
    def examples_per_epoch(self) -> int:
        """Conversations in an epoch, repetitions included."""
        return sum(epoch_size(len(part), one.weight) for part, one in zip(self._parts, self.sets, strict=True))

    def epoch(self, number: int, *, seed: int) -> list[int]:
        """The indices of the conversations of an epoch, set by set."""
        found = []
        for part, one in zip(self._parts, self.sets, strict=True):
            ids = [one.pivot.ids[self.places[index][1]] for index in part]
            found += [part[index] for index in epoch_members(ids, one.weight, epoch=number, seed=seed)]
        return found

    @cached_property
    def _parts(self) -> list[range]:
        """The indices of each set's conversations."""
        ends = np.searchsorted([place for place, _ in self.places], range(len(self.sets) + 1)).tolist()
        return [range(begin, end) for begin, end in pairwise(ends)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == PAD_INDEX:
            return _item(EMPTY, nothing(0), self._alone(EMPTY), 0)
        place, row = self.places[index]
        conversation = self.sets[place].pivot[row]
        candidates = self._candidates(self.sets[place], conversation)
        if not candidates:
            return _item(conversation, nothing(len(conversation)), self._alone(conversation), place, alone=True)
        found, share = self._compare(candidates, conversation)
        groups = teacher_selection.groups_of(conversation, self.rule.level)
        targets = mix([one.targets for one in candidates.values()], share[:, groups])
        comparison = None
        if self.rule.compares_with_student:
            numbers = np.array([self.candidates.index(name) for name in candidates])
            rows = [one.rows for one in candidates.values()]
            comparison = Comparison.of(
                conversation, rows, self.rule, best_source_ce=found.min(0), chosen=numbers[found.argmin(0)]
            )
        return _item(conversation, targets, comparison, place)

    def _alone(self, conversation: Prepared) -> Comparison | None:
        return Comparison.without_sources(conversation, self.rule) if self.rule.compares_with_student else None

    def _candidates(self, data: TeachingSet, conversation: Prepared) -> dict[str, Candidate]:
        """The models with distributions of a conversation, the pivot first."""
        identity, found = conversation.id, {}
        if data.captured is not None and identity in data.captured:
            captured = data.captured[identity]
            found[PIVOT] = Candidate(conversation, captured.nll, captured)
        for name, teacher in (data.teachers or {}).items():
            if identity in teacher.prepared.row_of and identity in teacher.captured:
                rows = teacher.prepared[teacher.prepared.row_of[identity]]
                found[name] = Candidate(rows, teacher.captured[identity].nll, teacher.aligned[identity])
        return found

    def _compare(self, candidates: Mapping[str, Candidate], conversation: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """The candidates' cross-entropies and weights [candidates, groups]."""
        each, how = list(candidates.values()), {"unit": self.rule.unit, "level": self.rule.level}
        found = teacher_selection.cross_entropies(each, conversation, **how)
        return found, teacher_selection.weights(
            found, self.rule.function, teacher_selection.token_sizes(each, conversation, **how)
        )

    @cached_property
    def chosen(self) -> dict[str, dict[str, float]]:
        """Who teaches, by set: for each candidate the number of groups (conversations, responses or rows) that it teaches, or
        for AvgCE the sum of its weights; also groups without a teacher, ties, and groups with one candidate only."""
        counts = {one.name: dict.fromkeys([*self._of(one), NONE, TIES, SINGLE_CANDIDATE], 0.0) for one in self.sets}
        for place, row in self.places:
            data = self.sets[place]
            conversation, count = data.pivot[row], counts[data.name]
            candidates = self._candidates(data, conversation)
            if not candidates:
                count[NONE] += len(np.unique(teacher_selection.groups_of(conversation, self.rule.level)))
                continue
            found, share = self._compare(candidates, conversation)
            for name, weight in zip(candidates, share.sum(axis=1).tolist(), strict=True):
                count[name] += weight
            count[NONE] += int(np.count_nonzero(share.sum(axis=0) == 0))
            count[TIES] += teacher_selection.ties(found)
            count[SINGLE_CANDIDATE] += int(np.count_nonzero(np.isfinite(found).sum(axis=0) == 1))
        return {name: {key: round(value, 4) for key, value in count.items()} for name, count in counts.items()}

    @staticmethod
    def _of(data: TeachingSet) -> list[str]:
        return [*([PIVOT] if data.captured is not None else []), *(data.teachers or {})]


EMPTY = Prepared(
    id="",
    input_ids=np.zeros(1, np.int32),
    **{name: np.zeros(0, np.int32) for name in ("position", "response", "begin", "end", "content_bytes")},
    end_of_turn=np.zeros(0, bool),
)


def _item(
    rows: Prepared, targets: SparseDistribution, comparison: Comparison | None, place: int, *, alone: bool = False
) -> dict[str, Any]:
    """`alone`: the conversation has no teacher."""
    return {
        "alone": alone,
        "input_ids": rows.input_ids,  # for `group_by_length`
        "conversation": rows,
        "targets": targets,
        "comparison": comparison,
        "set": place,
    }


def collate_fusion(items: Sequence[dict[str, Any]], *, pad: int) -> dict[str, Any]:
    """A batch for the trainer: padded tokens and, for the n response rows of all items, the targets.

    `labels` int64 [n], `target_ids` int64 [n, k] (-1 pads), `target_logprobs` float32 [n, k], `target_tail` float32 [n], `alone`
    bool [n], and `comparison` if sources are compared with the student.
    """
    conversations = [item["conversation"] for item in items]
    batch = collate(conversations, pad)
    k = max(item["targets"].ids.shape[1] for item in items)
    collated = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "rows": batch.rows,
        "labels": batch.input_ids[batch.rows[:, 0], batch.rows[:, 1]],
        "target_ids": _stack([item["targets"].ids for item in items], k, -1, torch.long),
        "target_logprobs": _stack([item["targets"].logprobs for item in items], k, -np.inf, torch.float32),
        "target_tail": torch.from_numpy(np.concatenate([item["targets"].tail for item in items])).float(),
        "alone": torch.from_numpy(np.repeat([item["alone"] for item in items], [len(one) for one in conversations])),
        "conversation_ids": [conversation.id for conversation in conversations if conversation.id],
    }
    if items[0]["comparison"] is not None:
        collated["comparison"] = join_comparisons(
            [item["comparison"] for item in items], [item["set"] for item in items]
        )
    return collated


def _stack(parts: list[np.ndarray], k: int, fill: float, dtype: torch.dtype) -> torch.Tensor:
    padded = [np.pad(part, ((0, 0), (0, k - part.shape[1])), constant_values=fill) for part in parts]
    return torch.from_numpy(np.concatenate(padded)).to(dtype)
