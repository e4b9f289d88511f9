"""Lead rows, before the content of a response: aligned where both models write the same text of the template.

A template may put a space between the generation prompt and the answer. Before a digit or a Chinese character it is a token of
its own, a *lead* row; before a word it is part of the first token. Lead rows are compared by the byte of the template where
they start, and correspond if both tokens have the same bytes from there. All of the source's candidates then start at the same
byte as the pivot's token, so that the vocabulary map applies to whole tokens.
"""

from dataclasses import replace

import numpy as np

from fusechat.align.sequence import Alignment
from fusechat.data.prepared import Prepared
from fusechat.models.token_bytes import TokenBytes


def align_leads(
    alignment: Alignment, pivot: Prepared, source: Prepared, spell: tuple[TokenBytes, TokenBytes]
) -> Alignment:
    """Adds the source rows of the pivot's lead rows to the alignment, and `whole`: both tokens start at the same byte of the
    template. A lead row of width 0 corresponds only to another of width 0."""
    source_row, whole = alignment.source_row.copy(), alignment.whole.copy()
    begins: dict[tuple[int, int, bool], int] = {}
    for row in np.flatnonzero(source.lead | (source.begin < 0)).tolist()[::-1]:  # the first row at a place wins
        begins[_place(source, row)] = row
    for row in np.flatnonzero(pivot.lead).tolist():
        source_row[row] = begins.get(_place(pivot, row), -1)
    for row in np.flatnonzero((source_row >= 0) & (pivot.lead | (pivot.begin < 0))).tolist():
        whole[row] = _same_start(row, int(source_row[row]), pivot, source, spell)
    source_row[pivot.lead & ~whole] = -1
    return replace(alignment, source_row=source_row, whole=whole)


def _place(rows: Prepared, row: int) -> tuple[int, int, bool]:
    """Response, first byte relative to the content's start, and whether the token has a width."""
    begin = int(rows.begin[row])
    return int(rows.response[row]), begin, int(rows.end[row]) > begin


def _same_start(
    row: int, source_row: int, pivot: Prepared, source: Prepared, spell: tuple[TokenBytes, TokenBytes]
) -> bool:
    """Whether two tokens start at the same byte with the same bytes of the template."""
    ours, theirs = spell[0][int(pivot.gold[row])], spell[1][int(source.gold[source_row])]
    begin = int(pivot.begin[row])
    shared = min(len(ours), len(theirs), len(ours) if pivot.lead[row] else -begin)
    return begin == int(source.begin[source_row]) and ours[:shared] == theirs[:shared]
