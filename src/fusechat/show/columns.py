"""The columns of two tokenizations drawn above each other: pure functions from spans and glyphs.

The bytes between two neighbouring boundaries of either tokenization are a *segment*. Its width is the larger of its glyphs'
widths in both rows, so that each boundary is in the same column of both.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from fusechat.show.glyphs import Glyph

Span = tuple[int, int]
SHARED, UPPER, LOWER, NEITHER = "┃", "╵", "╷", " "


@dataclass(frozen=True)
class Segment:
    """Bytes `[begin, end)`; for each row the index of the token that covers them (-1: none), and whether it starts here. A token
    of width 0 has an empty segment of its own, before the bytes that follow it."""

    begin: int
    end: int
    tokens: tuple[int, int]
    starts: tuple[bool, bool]

    @property
    def shared(self) -> bool:
        """Whether tokens of both rows start here."""
        return all(self.starts)

    @property
    def mark(self) -> str:
        """The character between the rows."""
        return {(True, True): SHARED, (True, False): UPPER, (False, True): LOWER}.get(self.starts, NEITHER)


@dataclass(frozen=True)
class Column:
    """A segment with the glyphs of each row."""

    segment: Segment
    glyphs: tuple[tuple[Glyph, ...], tuple[Glyph, ...]]

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return max(1, *(sum(glyph.width for glyph in row) for row in self.glyphs))


def segments(upper: Sequence[Span], lower: Sequence[Span]) -> list[Segment]:
    """The segments of both rows' spans, which are monotone and do not overlap. Bytes that neither covers are left out."""
    rows = (_Row(upper), _Row(lower))
    bounds = sorted({at for row in rows for at in row.bounds()})
    result = []
    for at, following in zip_longest(bounds, bounds[1:]):
        inside = tuple(row.covering(at, started_before=True) for row in rows)
        result += [Segment(at, at, (token, inside[1]), (True, False)) for token in rows[0].empty[at]]
        result += [Segment(at, at, (inside[0], token), (False, True)) for token in rows[1].empty[at]]
        over = rows[0].covering(at), rows[1].covering(at)
        if following is not None and max(over) >= 0:
            starts = over[0] != inside[0], over[1] != inside[1]
            result.append(Segment(at, following, over, starts))
    return result


class _Row:
    """The tokens of one row, looked up at increasing bytes."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.wide = [(begin, end, index) for index, (begin, end) in enumerate(spans) if end > begin]
        self.empty: defaultdict[int, list[int]] = defaultdict(list)
        for index, (begin, end) in enumerate(spans):
            if end <= begin:
                self.empty[begin].append(index)
        self.next = 0

    def bounds(self) -> Iterator[int]:
        yield from self.empty
        for begin, end, _ in self.wide:
            yield from (begin, end)

    def covering(self, at: int, *, started_before: bool = False) -> int:
        """The token that covers byte `at`, or -1."""
        while self.next < len(self.wide) and self.wide[self.next][1] <= at:
            self.next += 1
        if self.next == len(self.wide):
            return -1
        begin, _, index = self.wide[self.next]
        return index if begin < at or (begin == at and not started_before) else -1


def columns(
    parts: Sequence[Segment], upper: Sequence[Sequence[Glyph]], lower: Sequence[Sequence[Glyph]], *, limit: int
) -> list[Column]:
    """The segments with their glyphs, which are given for each token of each row. Segments wider than `limit` are cut."""
    rows = (upper, lower)
    result = []
    for part in parts:
        shown = tuple(
            tuple(
                glyph
                for glyph in (rows[side][token] if token >= 0 else ())
                if part.begin <= glyph.begin < part.end or (part.begin == part.end and part.starts[side])
            )
            for side, token in enumerate(part.tokens)
        )
        result += _cut(Column(part, (shown[0], shown[1])), limit)
    return result


def _cut(column: Column, limit: int) -> list[Column]:
    """Halves the column until it fits or is one glyph."""
    begins = sorted({glyph.begin for row in column.glyphs for glyph in row} - {column.segment.begin})
    if column.width <= limit or not begins:
        return [column]
    at = begins[len(begins) // 2]
    left, right = (
        tuple(tuple(glyph for glyph in row if (glyph.begin < at) == first) for row in column.glyphs)
        for first in (True, False)
    )
    return [
        *_cut(Column(replace(column.segment, end=at), (left[0], left[1])), limit),
        *_cut(Column(replace(column.segment, begin=at, starts=(False, False)), (right[0], right[1])), limit),
    ]


def lines(every: Sequence[Column], *, width: int, breaks: Collection[int] = ()) -> list[list[Column]]:
    """The columns in lines of at most `width`. Lines end at bytes of `breaks` where both rows start a token, else at the last
    shared start if the line is well filled by then. A wider column has a line of its own."""
    result = []
    first = 0
    while first < len(every):
        last = _end_of_line(every, first, width, breaks)
        result.append(list(every[first:last]))
        first = last
    return result


def _end_of_line(every: Sequence[Column], first: int, width: int, breaks: Collection[int]) -> int:
    used, shared = 0, first
    for at in range(first, len(every)):
        column = every[at]
        if at > first and column.segment.shared:
            if column.segment.begin in breaks:
                return at
            if 3 * used >= 2 * width:
                shared = at
        used += column.width
        if used > width and at > first:
            return shared if shared > first else at
    return len(every)
