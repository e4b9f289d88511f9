"""The vocabulary map W: which pivot token stands where a source token does. Source: METHOD, "Vocabulary map".

W is sparse and row-stochastic, [source vocabulary × pivot vocabulary]: `W[s, t]` is the probability that the pivot's token is
`t` where the source's is `s` and both start at the same byte.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fusechat.core.spans import TokenBytes

TAIL = -1  # a source token that corresponds to no pivot token: its mass joins the tail
SEEN, SPECIAL, SAME_BYTES, FIRST_TOKEN, LONGEST_PREFIX, TO_TAIL = (
    "seen",
    "special",
    "same bytes",
    "first token",
    "longest prefix",
    "tail",
)


@dataclass(frozen=True)
class Counts:
    """Pairs of tokens seen at shared starts: `source`, `pivot` int64 [p], sorted, distinct; `count` int64 [p]."""

    source: np.ndarray
    pivot: np.ndarray
    count: np.ndarray


def count_pairs(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Counts:
    """Counts (source ids, pivot ids) of aligned positions. A pair that occurs twice counts twice, in whatever order."""
    sources, pivots = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for source, pivot in pairs:
        sources.append(source.astype(np.int64))
        pivots.append(pivot.astype(np.int64))
    keys = (np.concatenate(sources) << 32) | np.concatenate(pivots)
    keys, count = np.unique(keys, return_counts=True)
    return Counts(source=keys >> 32, pivot=keys & 0xFFFFFFFF, count=count.astype(np.int64))


@dataclass(frozen=True)
class Roles:
    """Special tokens by what they do, each an id or None."""

    end_of_turn: int | None
    end_of_sequence: int | None
    begin_of_sequence: int | None


@dataclass
class VocabularyMap:
    """W in compressed rows for the source tokens that it knows: row r is source token `source[r]` and has the entries
    `pivot[offset[r] : offset[r + 1]]` with `weight`s that sum to one; a token that goes to the tail has none.

    `how` says, for each row, where it comes from: the counts, a special token's role, or which back-off.
    """

    source: np.ndarray  # int64 [rows], sorted
    offset: np.ndarray  # int64 [rows + 1]
    pivot: np.ndarray  # int64 [entries]
    weight: np.ndarray  # float64 [entries]
    how: list[str] = field(default_factory=list)

    def rows_of(self, tokens: np.ndarray) -> np.ndarray:
        """Index of each token's row; every token must be known."""
        rows = np.searchsorted(self.source, tokens)
        if len(tokens) and (rows.max() >= len(self.source) or (self.source[rows] != tokens).any()):
            raise KeyError("a token that the map was not built for")
        return rows

    @cached_property
    def origins(self) -> tuple[list[str], np.ndarray]:
        """The distinct values of `how`, and for each row which of them it has."""
        kinds, code = np.unique(np.array(self.how), return_inverse=True)
        return kinds.tolist(), code

    def entropy(self) -> float:
        """Mean entropy of the counted rows, in bits: 0 where every source token always met the same pivot token."""
        terms = -self.weight * np.log2(np.where(self.weight > 0, self.weight, 1.0))
        per_row = np.add.reduceat(np.append(terms, 0.0), self.offset[:-1]) * (np.diff(self.offset) > 0)
        seen = np.array([how == SEEN for how in self.how], dtype=bool)
        return float(per_row[seen].mean()) if seen.any() else 0.0


class BackOff:
    """Finds a pivot token for bytes that were never seen aligned: the token with the same bytes, else the first token of the
    pivot's encoding of them in the middle of a text, else (not UTF-8) the longest token that begins them, else none."""

    def __init__(self, pivot: TokenBytes) -> None:
        self.pivot = pivot
        self._by_bytes: dict[bytes, int] = {}
        # A byte's own token comes last: it is written only where no other spells the byte.
        tokens = sorted(range(len(pivot)), key=pivot.is_byte)
        for token in tokens:
            data = pivot.all()[token]
            if data and token not in pivot.special:
                self._by_bytes.setdefault(data, token)  # of equal spellings the lowest id
        self._longest = max(map(len, self._by_bytes), default=0)

    def __call__(self, data: bytes) -> tuple[int, str]:
        """The pivot token (or TAIL) for `data`, and how it was found."""
        if not data:
            return TAIL, TO_TAIL
        if data in self._by_bytes:
            return self._by_bytes[data], SAME_BYTES
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return self._longest_prefix(data)
        first = self._first_token(text)
        return (first, FIRST_TOKEN) if first is not None else self._longest_prefix(data)

    def _first_token(self, text: str) -> int | None:
        pieces = self.pivot.tokenizer.backend_tokenizer.model.tokenize(self.pivot.piece(text))
        if not pieces:
            return None
        token = int(pieces[0].id)
        begins = self.pivot[token] and text.encode().startswith(self.pivot[token])
        return token if begins and token not in self.pivot.special else None

    def _longest_prefix(self, data: bytes) -> tuple[int, str]:
        for length in range(min(len(data), self._longest), 0, -1):
            token = self._by_bytes.get(data[:length])
            if token is not None:
                return token, LONGEST_PREFIX
        return TAIL, TO_TAIL


def role_map(pivot: Roles, source: Roles) -> dict[int, int]:
    """Source special token → pivot special token of the same role. End of turn goes last: where a model ends turns with its
    end-of-sequence token, that token means end of turn."""
    pairs = (
        (source.begin_of_sequence, pivot.begin_of_sequence),
        (source.end_of_sequence, pivot.end_of_sequence),
        (source.end_of_turn, pivot.end_of_turn),
    )
    return {s: TAIL if p is None else p for s, p in pairs if s is not None}


def build_map(
    counts: Counts, needed: np.ndarray, *, source: TokenBytes, back_off: BackOff, roles: dict[int, int], top_1: bool
) -> VocabularyMap:
    """W for the source tokens `needed` (sorted, distinct) and all that were counted (the statistics map, "MS" in the paper)."""
    tokens = np.union1d(counts.source, needed)
    begin = np.searchsorted(counts.source, tokens, side="left")
    end = np.searchsorted(counts.source, tokens, side="right")
    pivots: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    how: list[str] = []
    one = np.ones(1)
    for token, first, last in zip(tokens.tolist(), begin.tolist(), end.tolist(), strict=True):
        if token in roles or token in source.special:
            target, reason = roles.get(token, TAIL), SPECIAL if roles.get(token, TAIL) != TAIL else TO_TAIL
        elif last > first:
            row = counts.count[first:last].astype(np.float64)
            if top_1:
                best = first + int(row.argmax())  # of equal counts the lowest pivot id
                pivots.append(counts.pivot[best : best + 1])
                weights.append(one)
            else:
                pivots.append(counts.pivot[first:last])
                weights.append(row / row.sum())
            how.append(SEEN)
            continue
        else:
            target, reason = back_off(source[token])
        pivots.append(np.array([target] if target != TAIL else [], dtype=np.int64))
        weights.append(one[: len(pivots[-1])])
        how.append(reason)
    lengths = [len(row) for row in pivots]
    return VocabularyMap(
        source=tokens,
        offset=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pivot=np.concatenate([np.zeros(0, dtype=np.int64), *pivots]),
        weight=np.concatenate([np.zeros(0), *weights]),
        how=how,
    )


def back_offs(vocabulary_map: VocabularyMap) -> dict[str, int]:
    """How many source tokens were mapped in which way."""
    return dict(sorted(Counter(vocabulary_map.how).items()))
