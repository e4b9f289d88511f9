"""Sequence alignment by byte boundaries. Source: METHOD, "Sequence alignment"."""

from dataclasses import dataclass

import numpy as np

from fusechat.core.prepared import Prepared


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


@dataclass(frozen=True)
class Alignment:
    """Row correspondences of one conversation.

    `source_row` int64 [n_pivot]: the source's row, -1 where there is none. `pivot_clip`, `source_clip` int64 [n_pivot]: how many
    bytes of the template the pivot's and the source's token take in before the content (0 nearly everywhere).
    """

    source_row: np.ndarray
    pivot_clip: np.ndarray
    source_clip: np.ndarray

    @property
    def unclipped(self) -> np.ndarray:
        """bool [n_pivot]: aligned, and neither token begins before the content."""
        return (self.source_row >= 0) & (self.pivot_clip == 0) & (self.source_clip == 0)


def align_rows(pivot: Prepared, source: Prepared) -> Alignment:
    """Aligns two models' rows of one conversation: content rows that start at the same byte of the same response, and the
    end-of-turn rows of a response with each other. A response that one of the two lost stays unaligned."""
    keys = []
    for rows in (pivot, source):
        # One number line for all responses: each has room for its longest possible content.
        room = int(max(pivot.end.max(), source.end.max())) + 2
        begin = rows.response.astype(np.int64) * room + np.where(rows.end_of_turn, room - 1, np.maximum(rows.begin, 0))
        width = np.where(rows.end_of_turn, 1, np.maximum(rows.end - np.maximum(rows.begin, 0), 0))
        keys.append(np.stack([begin, begin + width], axis=1))
    source_row = align_starts(keys[0], keys[1])
    clip = np.maximum(-source.begin.astype(np.int64), 0)
    return Alignment(
        source_row=source_row,
        pivot_clip=np.maximum(-pivot.begin.astype(np.int64), 0),
        source_clip=np.where(source_row >= 0, clip[source_row], 0),
    )
