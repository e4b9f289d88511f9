"""What is shown: a text or response with the tokens of two models, each as it is drawn, and how they correspond."""

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
    """A token that a distribution gives `probability`; `gold` where it is the one that stands in the text."""

    id: int
    text: str
    probability: float
    gold: bool


@dataclass(frozen=True)
class NextTokens:
    """The distribution at a token, most likely first; no candidates where the position is unaligned."""

    candidates: tuple[Candidate, ...] = ()
    tail: float | None = None  # the probability of all that was not kept
    gold: float | None = None  # the gold token's own probability, where it is known

    def likeliest(self, count: int) -> "NextTokens":
        """With at most `count` candidates; the others join the tail."""
        kept, others = self.candidates[:count], self.candidates[count:]
        own = next((candidate.probability for candidate in others if candidate.gold), self.gold)
        tail = None if self.tail is None else self.tail + sum(candidate.probability for candidate in others)
        return NextTokens(kept, tail, own)


@dataclass(frozen=True)
class Token:
    """`begin`, `end`: its bytes in the text; the end of turn, which is no byte of the text, stands one past the last, and a `lead`
    token, of the template before the text, has none."""

    id: int
    piece: str  # as the vocabulary spells it
    data: bytes  # what it stands for in the middle of a text
    begin: int
    end: int
    special: bool
    glyphs: tuple[Glyph, ...]
    end_of_turn: bool = False
    lead: bool = False
    forecast: NextTokens | None = None

    @property
    def span(self) -> tuple[int, int]:
        return self.begin, self.end


@dataclass(frozen=True)
class AlignedText:
    """One text. `asked` and `title` tell where it stands in a conversation."""

    text: str
    pivot: tuple[Token, ...]
    source: tuple[Token, ...]
    title: str = ""
    asked: str = ""

    @cached_property
    def partner(self) -> list[int]:
        """For every pivot token the source token that starts at the same byte, or -1."""
        found = align_starts(spans_of(self.pivot), spans_of(self.source))
        return [int(token) for token in found]

    @cached_property
    def partner_of_source(self) -> list[int]:
        result = [-1] * len(self.source)
        for token, partner in enumerate(self.partner):
            if partner >= 0:
                result[partner] = token
        return result

    def beginning(self, tokens: int) -> "AlignedText":
        """Up to a start that both share, after `tokens` pivot tokens or the first one past them; the whole where there is none."""
        for at in range(tokens, len(self.pivot)):
            if self.partner[at] >= 0:
                text = self.text.encode()[: self.pivot[at].begin].decode("utf-8", "ignore")
                return replace(self, text=text, pivot=self.pivot[:at], source=self.source[: self.partner[at]])
        return self

    @cached_property
    def segments(self) -> list[Segment]:
        return segments([token.span for token in self.pivot], [token.span for token in self.source])

    @cached_property
    def breaks(self) -> set[int]:
        """Bytes at which a line of the text, and the empty lines after it, are over."""
        data = self.text.encode()
        return {at for at in range(1, len(data)) if data[at - 1] == 0x0A and data[at] not in (0x0A, 0x0D)}

    def columns(self, *, limit: int) -> list[Column]:
        return columns(
            self.segments, [token.glyphs for token in self.pivot], [token.glyphs for token in self.source], limit=limit
        )


@dataclass(frozen=True)
class Model:
    """What is told of a model. `exact`: its spans are its tokens' own bytes, not the tokenizer's character offsets."""

    label: str
    exact: bool


@dataclass(frozen=True)
class TokenView:
    pivot: Model
    source: Model
    passages: tuple[AlignedText, ...]
    conversation: str | None = None
    notes: tuple[str, ...] = ()

    def tokens(self, row: str) -> list[Token]:
        return [token for passage in self.passages for token in getattr(passage, row)]

    @property
    def coverage(self) -> float | None:
        """The share of the pivot's tokens that do; lead tokens are not counted. None where there is no token."""
        tokens = sum(not token.lead for token in self.tokens("pivot"))
        return self.shared / tokens if tokens else None

    @property
    def shared(self) -> int:
        """How many pivot tokens start at a byte at which a source token starts."""
        return sum(partner >= 0 for passage in self.passages for partner in passage.partner)

    @property
    def inside(self) -> int:
        """How many pivot tokens begin inside a source token."""
        return sum(
            segment.starts[0] and segment.end > segment.begin and segment.tokens[1] >= 0 and not segment.starts[1]
            for passage in self.passages
            for segment in passage.segments
        )


def bytes_per_token(tokens: Sequence[Token]) -> float | None:
    """Bytes of text per token, the end of turn and lead tokens left out; None where there is no token."""
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
    """The tokens of a text's bytes `data`: ids [n], spans [n, 2], which may begin before the text, and which of them are an
    end of turn, or lead, bool [n]. `table` is the tokenizer's `TokenBytes`."""
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
    else:  # not of the text: drawn in one piece
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
    piece = table.tokenizer.convert_ids_to_tokens(token)
    return str(piece) if piece is not None else f"id {token}, past the tokenizer's"


def spans_of(tokens: Sequence[Token]) -> np.ndarray:
    """int64 [n, 2]."""
    return np.asarray([token.span for token in tokens], dtype=np.int64).reshape(-1, 2)
