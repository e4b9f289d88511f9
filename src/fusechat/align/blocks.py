"""Aligns conversations block by block, in this process or in several. The result of a block depends on the block alone, and
blocks are joined in order, so that results do not depend on the number of processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fusechat.align.aligner import Aligner, Pair, Survey
from fusechat.align.back_off import BackOff
from fusechat.align.batching import ConversationBatch, groups, join, join_distributions, split
from fusechat.align.check import check_conversation
from fusechat.align.counts import Counts, Seen, add_counts, add_seen
from fusechat.align.processes import Processes
from fusechat.align.stats import AlignmentStats, add_figures
from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.distributions import DistributionSet, SparseDistribution, nothing, open_distributions
from fusechat.data.prepared import Prepared, PreparedSet
from fusechat.run.progress import Advance
from fusechat.run.usage import cores

R = TypeVar("R")
SIZE = 256  # conversations in a block
WORTH = 2_000_000  # rows for which starting a process pays off
Rows = list[tuple[str, SparseDistribution]]


class Conversations:
    """Two models' data of the same conversations: one directory for each set, opened by each process for itself.

    `pivot`, `source`: prepared conversations. `captured`: the source's distributions. `fill`: the pivot's own, if needed.
    `names`: the models' names in errors. `sizes`: both vocabulary sizes, padding included. `without`: ids to leave out. `checked`:
    what is stored is known to fit together, or rows are left out, so that texts cannot be compared.
    """

    def __init__(
        self,
        pivot: Sequence[Path],
        source: Sequence[Path],
        captured: Sequence[Path],
        *,
        names: tuple[str, str],
        sizes: tuple[int, int],
        fill: Sequence[Path] = (),
        without: Iterable[str] = (),
        checked: bool = False,
    ) -> None:
        self._places = pivot, source, captured, fill
        self.names, self.sizes, self.without, self.checked = names, sizes, frozenset(without), checked

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("_places", "names", "sizes", "without", "checked")}

    @cached_property
    def pivot(self) -> PreparedSet:
        """The pivot's prepared conversations."""
        return PreparedSet(*self._places[0])

    @cached_property
    def source(self) -> PreparedSet:
        """The source's prepared conversations."""
        return PreparedSet(*self._places[1])

    @cached_property
    def captured(self) -> DistributionSet | None:
        """The source's distributions. Raises WorkdirError for damaged shards."""
        return self._open(2)

    @cached_property
    def fill(self) -> DistributionSet | None:
        """The pivot's own distributions. Raises WorkdirError for damaged shards."""
        return self._open(3)

    def _open(self, place: int) -> DistributionSet | None:
        """Opens a store. Checksums are verified once, not again in every process."""
        directories = self._places[place]
        return open_distributions(*directories, verify=parent_process() is None) if directories else None

    def has(self, identity: str) -> bool:
        """Whether both models have the conversation, and the source its distributions if there is a store."""
        known = self.captured.index if self.captured else self.source.row_of
        here = identity in self.pivot.row_of and identity in self.source.row_of and identity in known
        return here and identity not in self.without

    def filling(self, identity: str, rows: int, k: int) -> SparseDistribution:
        """The pivot's own distributions of a conversation, cut or padded to `k` tokens; only pads if there are none."""
        result = nothing(rows, k)
        if self.fill and identity in self.fill:
            own = self.fill[identity].cut(k)
            width = own.ids.shape[1]
            result.ids[:, :width], result.logprobs[:, :width], result.tail[:] = own.ids, own.logprobs, own.tail
        return result

    @property
    def rows(self) -> int:
        """The number of response rows of the pivot."""
        return int(self.pivot.table.list_lengths("position").sum())

    @property
    def ids(self) -> list[str]:
        """The ids of the pivot's conversations, in order and without repetitions."""
        return list(self.pivot.row_of)

    def common(self) -> list[str]:
        """The ids of conversations that both models have, in the pivot's order."""
        return [identity for identity in self.ids if self.has(identity)]

    def pair(self, identity: str) -> tuple[Prepared, Prepared]:
        """The pivot's and the source's rows of a conversation."""
        return self.pivot[self.pivot.row_of[identity]], self.source[self.source.row_of[identity]]


class Blocks:
    """The three passes over the conversations of a training set, as a context manager that owns the processes. `processes`: at
    most this many; by default as many as there are cores and enough work for. `directory`: see `Processes`."""

    def __init__(
        self,
        pair: Pair,
        data: Conversations,
        *,
        processes: int | None = None,
        size: int = SIZE,
        directory: Path | None = None,
    ) -> None:
        self.pair, self.data, self.size = pair, data, size
        self.processes = Processes(processes or max(1, min(cores(), data.rows // WORTH)), directory)

    def __enter__(self) -> "Blocks":
        return self

    def __exit__(self, *error: object) -> None:
        self.processes.__exit__(*error)

    def count(self, advance: Advance) -> Counts:
        """Pass one: counts pairs of tokens with shared starts. Raises WorkdirError for stored rows that do not match."""
        return add_counts(self._over(_count, (self.pair, self.data), self.data.common(), advance))

    def survey(self, is_open: np.ndarray, advance: Advance) -> Seen:
        """Pass two: collects what else the map needs to know."""
        return add_seen(self._over(_survey, (self.pair, self.data, is_open), self.data.common(), advance))

    def build_map(self, back_off: BackOff, advance: Advance) -> tuple[VocabularyMap, np.ndarray]:
        """Passes one and two, and the resulting map; also bool [source tokens]: tokens that longer pivot tokens start with."""
        seen, is_open = self.see(advance)
        return self.pair.build_map(seen, back_off), is_open

    def see(self, advance: Advance) -> tuple[Seen, np.ndarray]:
        """Passes one and two."""
        counts = self.count(advance)
        is_open = self.pair.extendable_tokens(counts)
        seen = self.survey(is_open, advance)
        seen.pairs = counts
        return seen, is_open

    def build_further(
        self, before: tuple[Seen, np.ndarray], back_off: BackOff, advance: Advance
    ) -> tuple[VocabularyMap, np.ndarray]:
        """As `build_map`, with the counts of other conversations, which were seen `before`: of these the map only has a row for all
        that their distributions hold."""
        seen, is_open = before
        here = self.survey(is_open, advance)
        both = add_seen([seen, Seen(tokens=here.tokens, remaining_bytes=here.remaining_bytes)])
        both.pairs = seen.pairs
        return self.pair.build_map(both, back_off), is_open

    def align(
        self, vocabulary_map: VocabularyMap, is_open: np.ndarray, *, k: int, advance: Advance, figures: AlignmentStats
    ) -> Iterator[tuple[str, SparseDistribution]]:
        """Pass three: yields (id, targets) for all conversations of the pivot, in order; adds to `figures`."""
        state = (self.pair, self.data, vocabulary_map, is_open, k)
        for rows, part in self._over(_align, state, self.data.ids, advance):
            yield from rows
            add_figures(figures, part)

    def _over(
        self, work: Callable[[Any, list[str]], R], state: Any, ids: Sequence[str], advance: Advance
    ) -> Iterator[R]:
        """Yields `work(state, block)` for every block, in order."""
        blocks = [list(ids[begin : begin + self.size]) for begin in range(0, len(ids), self.size)]
        for block, result in zip(blocks, self.processes.map(work, state, blocks), strict=True):
            yield result
            advance(len(block))


def _joined(data: Conversations, block: list[str]) -> Iterator[ConversationBatch]:
    """The conversations of a block that both models have, in batches."""
    both = [identity for identity in block if data.has(identity)]
    pairs = [data.pair(identity) for identity in both]
    for group in groups([len(pivot) for pivot, _ in pairs]):
        captured = [data.captured[both[index]] for index in group] if data.captured else None
        yield join([pairs[index] for index in group], captured)


def _count(state: tuple[Pair, Conversations], block: list[str]) -> Counts:
    pair, data = state
    survey = Survey(pair)
    for identity in block if not data.checked else ():
        captured = data.captured[identity] if data.captured else None
        check_conversation(*data.pair(identity), captured, pair=pair, names=data.names, sizes=data.sizes)
    for joined in _joined(data, block):
        survey.count(joined.pivot, joined.source)
    return survey.counts()


def _survey(state: tuple[Pair, Conversations, np.ndarray], block: list[str]) -> Seen:
    pair, data, is_open = state
    survey = Survey(pair, is_open)
    for joined in _joined(data, block):
        survey.need(joined.pivot, joined.source, joined.captured)
    return survey.seen()


def _align(
    state: tuple[Pair, Conversations, VocabularyMap, np.ndarray, int], block: list[str]
) -> tuple[Rows, AlignmentStats]:
    pair, data, vocabulary_map, is_open, k = state
    aligner = Aligner(pair, vocabulary_map, is_open)
    rows: dict[str, SparseDistribution] = {}
    for joined in _joined(data, block):
        assert joined.captured is not None
        own = [
            data.filling(identity, n, k) for identity, n in zip(joined.ids, joined.lengths, strict=True) if data.fill
        ]
        fill = join_distributions(own) if own else None
        several = aligner.align(joined.pivot, joined.source, joined.captured, k=k, fill=fill)
        logprobs, tail = several.logprobs.astype(np.float16), several.tail.astype(np.float32)
        stored = replace(several, logprobs=logprobs, tail=tail)  # less to send
        rows.update(zip(joined.ids, split(stored, joined.lengths), strict=True))
        aligner.figures.conversations += len(joined.ids)
    for identity in block:
        if identity not in rows:
            pivot = data.pivot[data.pivot.row_of[identity]]
            rows[identity] = aligner.unaligned(pivot, k=k, fill=data.filling(identity, len(pivot), k))
    return [(identity, rows[identity]) for identity in block], aligner.figures
