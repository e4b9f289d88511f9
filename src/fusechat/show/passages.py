"""Token views: a text or response with the tokens of two models, as drawn, and their correspondence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fusechat.align import align_starts
from fusechat.show.columns import Column, Segment, columns, segments
from fusechat.show.glyphs import NOTHING, Glyph, bracketed, glyphs_of


@dataclass(frozen=True)
class Candidate:
    """A token with its `probability`; `gold`: it is the actual token."""

    id: int
    text: str
    probability: float
    gold: bool


@dataclass(frozen=True)
class NextTokens:
    """The distribution at a token, most probable first; no candidates at an unaligned position."""

    candidates: tuple[Candidate, ...] = ()
    tail: float | None = None  # the probability of all other tokens
    gold: float | None = None  # the gold token's probability, if known

    def likeliest(self, count: int) -> "NextTokens":
        """With at most `count` candidates; the others join the tail."""
        kept, others = self.candidates[:count], self.candidates[count:]
        own = next((candidate.probability for candidate in others if candidate.gold), self.gold)
        tail = None if self.tail is None else self.tail + sum(candidate.probability for candidate in others)
        return NextTokens(kept, tail, own)


@dataclass(frozen=True)
class Token:
    """A token and its bytes `begin`, `end` in the text. The end of turn, which has no bytes, is one past the last; a `lead`
    token, of the template before the text, has none."""

    id: int
    piece: str  # the vocabulary's spelling
    data: bytes  # its bytes in the middle of a text
    begin: int
    end: int
    special: bool
    glyphs: tuple[Glyph, ...]
    end_of_turn: bool = False
    lead: bool = False
    forecast: NextTokens | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Its bytes in the text."""
        return self.begin, self.end


@dataclass(frozen=True)
class AlignedText:
    """One text with both models' tokens. `asked` and `title` give its place in a conversation."""

    text: str
    pivot: tuple[Token, ...]
    source: tuple[Token, ...]
    title: str = ""
    asked: str = ""

    @cached_property
    def partner(self) -> list[int]:
        """For each pivot token, the source token that starts at the same byte, or -1."""
        found = align_starts(spans_of(self.pivot), spans_of(self.source))
        return [int(token) for token in found]

    @cached_property
    def partner_of_source(self) -> list[int]:
        """For each source token, the pivot token that starts at the same byte, or -1."""
        result = [-1] * len(self.source)
        for token, partner in enumerate(self.partner):
            if partner >= 0:
                result[partner] = token
        return result

    def beginning(self, tokens: int) -> "AlignedText":
        """Up to the first shared start after `tokens` pivot tokens or more; the whole text if there is none."""
        for at in range(tokens, len(self.pivot)):
            if self.partner[at] >= 0:
                text = self.text.encode()[: self.pivot[at].begin].decode("utf-8", "ignore")
                return replace(self, text=text, pivot=self.pivot[:at], source=self.source[: self.partner[at]])
        return self

    @cached_property
    def segments(self) -> list[Segment]:
        """The segments of both token rows."""
        return segments([token.span for token in self.pivot], [token.span for token in self.source])

    @cached_property
    def breaks(self) -> set[int]:
        """Bytes where a line of the text, with the empty lines after it, ends."""
        data = self.text.encode()
        return {at for at in range(1, len(data)) if data[at - 1] == 0x0A and data[at] not in (0x0A, 0x0D)}

    def columns(self, *, limit: int) -> list[Column]:
        """The segments with their glyphs, at most `limit` wide."""
        return columns(
            self.segments, [token.glyphs for token in self.pivot], [token.glyphs for token in self.source], limit=limit
        )


@dataclass(frozen=True)
class Model:
    """A model's name. `exact`: spans are from its tokens' own bytes, not from character offsets."""

    label: str
    exact: bool


@dataclass(frozen=True)
class TokenView:
    """Both models' tokens of one or several texts."""

    pivot: Model
    source: Model
    passages: tuple[AlignedText, ...]
    conversation: str | None = None
    notes: tuple[str, ...] = ()

    def tokens(self, row: str) -> list[Token]:
        """All tokens of a row, `pivot` or `source`."""
        return [token for passage in self.passages for token in getattr(passage, row)]

    @property
    def coverage(self) -> float | None:
        """The share of the pivot's tokens, without lead tokens, that start where a source token starts; None without tokens."""
        tokens = sum(not token.lead for token in self.tokens("pivot"))
        return self.shared / tokens if tokens else None

    @property
    def shared(self) -> int:
        """How many pivot tokens start where a source token starts."""
        return sum(partner >= 0 for passage in self.passages for partner in passage.partner)

    @property
    def inside(self) -> int:
        """How many pivot tokens start inside a source token."""
        return sum(
            segment.starts[0] and segment.end > segment.begin and segment.tokens[1] >= 0 and not segment.starts[1]
            for passage in self.passages
            for segment in passage.segments
        )


def bytes_per_token(tokens: Sequence[Token]) -> float | None:
    """Bytes of text per token, without ends of turn and lead tokens; None without tokens."""
    content = [token for token in tokens if not token.end_of_turn and not token.lead]
    return sum(token.end - token.begin for token in content) / len(content) if content else None


def tokens_of(
    table: Any,
    data: bytes,
    *,
    ids: np.ndarray,
    spans: np.ndarray,
    end_of_turn: np.ndarray | None = None,
    lead: np.ndarray | None = None,
) -> tuple[Token, ...]:
    """The tokens of a text's bytes `data`. `table`: the tokenizer's `TokenBytes`. `ids` [n]; `spans` [n, 2], which may begin
    before the text; `end_of_turn`, `lead` bool [n]."""
    closing = np.zeros(len(ids), dtype=bool) if end_of_turn is None else end_of_turn
    before = np.zeros(len(ids), dtype=bool) if lead is None else lead
    begins = np.where(closing, len(data), np.maximum(spans[:, 0], 0)).tolist()
    ends = np.where(closing, len(data) + 1, np.where(before, begins, spans[:, 1])).tolist()
    columns = zip(ids.tolist(), begins, ends, closing.tolist(), before.tolist(), strict=True)
    return tuple(
        replace(_token(table, token, data=data, span=(begin, end), end_of_turn=closes), lead=leads)
        for token, begin, end, closes, leads in columns
    )


def _token(table: Any, token: int, *, data: bytes, span: tuple[int, int], end_of_turn: bool) -> Token:
    own, special = table[token], token in table.special
    begin, end = span
    if end > begin and not end_of_turn:
        glyphs = glyphs_of(data[begin:end], begin)
    else:  # not in the text: drawn as one piece
        glyphs = [replace(glyph, begin=begin) for glyph in glyphs_of(own)] or [Glyph(NOTHING, begin, stands_in=True)]
    return Token(
        id=token,
        piece=piece_of(table, token),
        data=own,
        begin=begin,
        end=end,
        special=special,
        glyphs=tuple(bracketed(glyphs) if special else glyphs),
        end_of_turn=end_of_turn,
    )


def piece_of(table: Any, token: int) -> str:
    """A token as the vocabulary spells it."""
    piece = table.tokenizer.convert_ids_to_tokens(token)
    return str(piece) if piece is not None else f"id {token}, past the tokenizer's"


def spans_of(tokens: Sequence[Token]) -> np.ndarray:
    """int64 [n, 2]: the tokens' bytes in the text."""
    return np.asarray([token.span for token in tokens], dtype=np.int64).reshape(-1, 2)
