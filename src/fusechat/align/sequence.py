"""Sequence alignment: which source row predicts the same text as a pivot row (arXiv 2408.07990, section 3.3)."""

from dataclasses import dataclass

import numpy as np

from fusechat.data.prepared import Prepared


def align_starts(pivot_spans: np.ndarray, source_spans: np.ndarray) -> np.ndarray:
    """For each pivot token, the source token that starts at the same byte, or -1: int64 [n_pivot].

    `pivot_spans`, `source_spans`: int64 [n_pivot, 2] and [n_source, 2], bytes `[begin, end)` of one text, as `token_spans`
    returns them. Tokens of width 0 are not aligned. Source spans need no order; the time is O(n log n), for the sort.
    """
    pivot_spans, source_spans = (
        np.asarray(spans, dtype=np.int64).reshape(-1, 2) for spans in (pivot_spans, source_spans)
    )
    result = np.full(len(pivot_spans), -1, dtype=np.int64)
    wide = np.flatnonzero(source_spans[:, 1] > source_spans[:, 0])
    if not len(wide):
        return result
    starts, first = np.unique(source_spans[wide, 0], return_index=True)
    at = np.minimum(np.searchsorted(starts, pivot_spans[:, 0]), len(starts) - 1)
    same = (starts[at] == pivot_spans[:, 0]) & (pivot_spans[:, 1] > pivot_spans[:, 0])
    result[same] = wide[first[at[same]]]
    return result


def containing(pivot_spans: np.ndarray, source_spans: np.ndarray) -> np.ndarray:
    """For each pivot token, the source token that it starts inside of: int64 [n_pivot].

    -1 for pivot tokens that start with a source token or have width 0. Spans as for `align_starts`; the source's are in order.
    """
    wide = np.flatnonzero(source_spans[:, 1] > source_spans[:, 0])
    if not len(wide) or not len(pivot_spans):
        return np.full(len(pivot_spans), -1, dtype=np.int64)
    before = np.searchsorted(source_spans[wide, 0], pivot_spans[:, 0]) - 1  # the last that starts earlier
    candidate = wide[np.maximum(before, 0)]
    inside = (before >= 0) & (source_spans[candidate, 1] > pivot_spans[:, 0]) & (pivot_spans[:, 1] > pivot_spans[:, 0])
    starts_with_one = align_starts(pivot_spans, source_spans) >= 0
    return np.where(inside & ~starts_with_one, candidate, -1)


@dataclass(frozen=True)
class Alignment:
    """Corresponding rows of one conversation: int64 [n_pivot], `lead` and `whole` bool [n_pivot].

    `source_row`: the source's row, or -1. `pivot_clip`, `source_clip`: bytes of the template that the pivot's and the source's
    token cover before the content, mostly 0. `inside_row`: for rows without `source_row`, the source row whose token the
    pivot's starts inside of, or -1; `given`: bytes of that token before this point. `lead`: the pivot's lead rows, before the
    content. `whole`: both tokens start at the same byte of the template.
    """

    source_row: np.ndarray
    pivot_clip: np.ndarray
    source_clip: np.ndarray
    inside_row: np.ndarray
    given: np.ndarray
    lead: np.ndarray
    whole: np.ndarray

    @property
    def aligned(self) -> np.ndarray:
        """bool [n_pivot]: content rows and ends of turn that have a source row."""
        return (self.source_row >= 0) & ~self.lead

    @property
    def unclipped(self) -> np.ndarray:
        """bool [n_pivot]: aligned rows where neither token starts before the content."""
        return self.aligned & (self.pivot_clip == 0) & (self.source_clip == 0)

    @property
    def inside(self) -> np.ndarray:
        """bool [n_pivot]: rows that are not aligned, and whose token starts inside a source token."""
        return self.inside_row >= 0


def align_rows(pivot: Prepared, source: Prepared, source_row: np.ndarray | None = None) -> Alignment:
    """Aligns content rows that start at the same byte of the same response, and end-of-turn rows of the same response.

    Responses that one model lost, and lead rows, stay unaligned. `source_row` int64 [n_pivot] replaces the correspondence by
    starts; dynamic time warping passes its own.
    """
    ours, theirs = number_line(pivot, source)
    if source_row is None:
        source_row = align_starts(ours, theirs)
    inside_row = np.where((source_row < 0) & ~pivot.end_of_turn, containing(ours, theirs), -1)
    clip = np.maximum(-source.begin.astype(np.int64), 0)
    given = ours[:, 0] - theirs[inside_row, 0] + clip[inside_row]
    return Alignment(
        source_row=source_row,
        pivot_clip=np.maximum(-pivot.begin.astype(np.int64), 0),
        source_clip=np.where(source_row >= 0, clip[source_row], 0),
        inside_row=inside_row,
        given=np.where(inside_row >= 0, given, 0),
        lead=pivot.lead,
        whole=np.zeros(len(pivot), dtype=bool),
    )


def number_line(pivot: Prepared, source: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """The spans of both models' rows on one number line for all responses: two arrays int64 [n, 2], in bytes. Each response has
    room for its longest content, followed by its end of turn. Lead rows have width 0, and so are not aligned."""
    room = int(max(pivot.end.max(), source.end.max())) + 2
    spans = []
    for rows in (pivot, source):
        first = np.maximum(rows.begin, 0).astype(np.int64)
        begin = rows.response.astype(np.int64) * room + np.where(rows.end_of_turn, room - 1, first)
        width = np.where(rows.end_of_turn, 1, np.where(rows.lead, 0, np.maximum(rows.end - first, 0)))
        spans.append(np.stack([begin, begin + width], axis=1))
    return spans[0], spans[1]
