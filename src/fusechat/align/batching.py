"""Several conversations joined into one, so that NumPy works on many rows at once.

Rows are aligned within their response. With consecutive response numbers, the result is that of each conversation alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared

ROWS = 1 << 14  # rows of the pivot in a batch


@dataclass(frozen=True)
class ConversationBatch:
    """Both models' rows of several conversations, and the source's distributions if given, in the same order."""

    ids: list[str]
    pivot: Prepared
    source: Prepared
    captured: SparseDistribution | None
    lengths: list[int]  # rows of the pivot in each conversation


def join(
    several: Sequence[tuple[Prepared, Prepared]], captured: Sequence[SparseDistribution] | None = None
) -> ConversationBatch:
    """Joins (pivot, source) pairs, in order. All distributions have the same k."""
    room = [max(len(side.content_bytes) for side in pair) for pair in several]
    first = np.concatenate([[0], np.cumsum(room)])[:-1].tolist()
    return ConversationBatch(
        ids=[pivot.id for pivot, _ in several],
        pivot=_one([pivot for pivot, _ in several], first),
        source=_one([source for _, source in several], first),
        captured=None if captured is None else join_distributions(captured),
        lengths=[len(pivot) for pivot, _ in several],
    )


def join_distributions(several: Sequence[SparseDistribution]) -> SparseDistribution:
    """Concatenates distributions of the same k."""
    return SparseDistribution(
        ids=np.concatenate([each.ids for each in several]),
        logprobs=np.concatenate([each.logprobs for each in several]),
        nll=np.concatenate([each.nll for each in several]),
        tail=np.concatenate([each.tail for each in several]),
    )


def split(rows: SparseDistribution, lengths: Sequence[int]) -> Iterator[SparseDistribution]:
    """The distributions of each conversation; `lengths`: its rows."""
    begin = 0
    for length in lengths:
        yield rows.take(slice(begin, begin + length))
        begin += length


def groups(lengths: Sequence[int], rows: int = ROWS) -> Iterator[range]:
    """Ranges of consecutive conversations with at most `rows` rows together; a longer conversation is a range by itself."""
    begin, held = 0, 0
    for index, length in enumerate(lengths):
        if held and held + length > rows:
            yield range(begin, index)
            begin, held = index, 0
        held += length
    if begin < len(lengths):
        yield range(begin, len(lengths))


def _one(several: list[Prepared], first_response: list[int]) -> Prepared:
    tokens = np.concatenate([[0], np.cumsum([len(each.input_ids) for each in several])])[:-1].tolist()
    return Prepared(
        id="",
        input_ids=np.concatenate([each.input_ids for each in several]),
        position=np.concatenate([each.position + at for each, at in zip(several, tokens, strict=True)]),
        response=np.concatenate([each.response + at for each, at in zip(several, first_response, strict=True)]),
        begin=np.concatenate([each.begin for each in several]),
        end=np.concatenate([each.end for each in several]),
        end_of_turn=np.concatenate([each.end_of_turn for each in several]),
        lead=np.concatenate([each.lead for each in several]),
        content_bytes=np.zeros(0, dtype=np.int32),  # unused
    )
