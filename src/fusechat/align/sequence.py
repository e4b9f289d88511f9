"""Sequence alignment: which source row speaks of the same text as a pivot row (the paper, section 3.3)."""

from dataclasses import dataclass

import numpy as np

from fusechat.data.prepared import Prepared


def align_starts(pivot_spans: np.ndarray, source_spans: np.ndarray) -> np.ndarray:
    """For every pivot token the source token that starts at the same byte, -1 where none does.

    Takes spans int64 [n_pivot, 2] and [n_source, 2] of one text, as `token_spans` gives them; returns int64 [n_pivot].
    Tokens without width correspond to nothing; linear in the number of tokens but for the sorting of sorted starts.
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
    """For every pivot token the source token that it starts inside of, -1 where it starts with one or is without width.

    Takes spans as `align_starts` does, the source's in order; returns int64 [n_pivot].
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
    """Row correspondences of one conversation; arrays int64 [n_pivot], the last two bool.

    `source_row`: the source's row, -1 where there is none. `pivot_clip`, `source_clip`: how many bytes of the template the
    pivot's and the source's token take in before the content (0 nearly everywhere). `inside_row`: where there is none, the
    source's row whose token the pivot's starts inside of, else -1; `given`: how many of that token's bytes come before.
    `lead`: the pivot's lead rows, which stand before the content; `whole`: the two tokens begin at the same byte of the template.
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
        """bool [n_pivot]: rows of the content, or ends of turn, that have a source row."""
        return (self.source_row >= 0) & ~self.lead

    @property
    def unclipped(self) -> np.ndarray:
        """bool [n_pivot]: aligned, and neither token begins before the content."""
        return self.aligned & (self.pivot_clip == 0) & (self.source_clip == 0)

    @property
    def inside(self) -> np.ndarray:
        """bool [n_pivot]: not aligned, and the pivot's token starts inside a source token."""
        return self.inside_row >= 0


def align_rows(pivot: Prepared, source: Prepared, source_row: np.ndarray | None = None) -> Alignment:
    """Aligns two models' rows of one conversation: content rows that start at the same byte of the same response, and the
    end-of-turn rows of a response with each other. A response that one of the two lost stays unaligned, and so do lead rows.

    `source_row` int64 [n_pivot] replaces the correspondence by starts (dynamic time warping has its own).
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
    """The spans of both models' rows on one number line for all responses, int64 [n, 2] each: a response has room for its
    longest content, and its end of turn stands after it. Lead rows have no width, and so correspond to nothing here."""
    room = int(max(pivot.end.max(), source.end.max())) + 2
    spans = []
    for rows in (pivot, source):
        first = np.maximum(rows.begin, 0).astype(np.int64)
        begin = rows.response.astype(np.int64) * room + np.where(rows.end_of_turn, room - 1, first)
        width = np.where(rows.end_of_turn, 1, np.where(rows.lead, 0, np.maximum(rows.end - first, 0)))
        spans.append(np.stack([begin, begin + width], axis=1))
    return spans[0], spans[1]
