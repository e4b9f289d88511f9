"""The vocabulary map W: the pivot tokens that correspond to each source token. See docs/alignment.md.

W is sparse and row-stochastic, [source vocabulary × pivot vocabulary]: `W[s, t]` is the probability that the pivot's token is
`t` if the source's is `s` and both start at the same byte. It also has rows for byte strings: what remains of a source token
where a pivot token starts inside it, or before the content.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusechat.align.back_off import ORIGINS, SAME_TOKEN, SEEN, SPECIAL, TAIL, TO_TAIL, BackOff
from fusechat.align.counts import Counts, Seen
from fusechat.models.token_bytes import TokenBytes
from fusechat.run.files import atomic_file

Lookup = Callable[[Sequence[bytes]], list[tuple[int, str]]]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens by role, or None."""

    end_of_turn: int | None
    end_of_sequence: int | None
    begin_of_sequence: int | None


def same_tokens(one: TokenBytes, other: TokenBytes) -> bool:
    """Whether two tokenizers have the same bytes for every id, and the same special and added ids."""
    return one.pieces == other.pieces and one.special == other.special and one.added.keys() == other.added.keys()


def special_token_map(pivot: SpecialTokens, source: SpecialTokens) -> dict[int, int]:
    """Maps each source special token to the pivot's of the same role, or to TAIL. End of turn wins: if a model ends turns with
    its end-of-sequence token, that token means end of turn."""
    pairs = (
        (source.begin_of_sequence, pivot.begin_of_sequence),
        (source.end_of_sequence, pivot.end_of_sequence),
        (source.end_of_turn, pivot.end_of_turn),
    )
    return {s: TAIL if p is None else p for s, p in pairs if s is not None}


@dataclass
class VocabularyMap:
    """W in compressed rows: row r has entries `pivot[offset[r] : offset[r + 1]]` with `weight`s that sum to 1, or none (tail).

    The first rows are the source tokens `source`, the others the byte strings `remaining_bytes`, in order. `origin` gives for
    each row an index into `ORIGINS`: counts, a special token's role, or a back-off.
    """

    source: np.ndarray  # int64 [token rows], sorted
    remaining_bytes: list[bytes]
    offset: np.ndarray  # int64 [rows + 1]
    pivot: np.ndarray  # int64 [entries]
    weight: np.ndarray  # float64 [entries]
    origin: np.ndarray  # int8 [rows]

    def rows_of(self, tokens: np.ndarray) -> np.ndarray:
        """int64: the row of each source token. Raises KeyError for a token that the map was not built for."""
        rows = self._row_of_token[np.minimum(tokens, len(self._row_of_token) - 1)]
        if (rows < 0).any():
            raise KeyError("a token that the map was not built for")
        return rows

    @cached_property
    def _row_of_token(self) -> np.ndarray:
        size = int(self.source[-1]) + 2 if len(self.source) else 1  # the last is for all larger ids
        rows = np.full(size, -1, dtype=np.int64)
        rows[self.source] = np.arange(len(self.source))
        return rows

    @cached_property
    def row_of_remainder(self) -> dict[bytes, int]:
        """The row of each byte string in `remaining_bytes`."""
        return {rest: len(self.source) + index for index, rest in enumerate(self.remaining_bytes)}

    def entropy(self) -> float:
        """Mean entropy of the counted rows in bits: 0 if every source token always met the same pivot token."""
        seen = (self.origin == ORIGINS.index(SEEN)) & (np.diff(self.offset) > 0)
        if not seen.any():
            return 0.0
        terms = -self.weight * np.log2(np.where(self.weight > 0, self.weight, 1.0))
        return float(np.add.reduceat(np.append(terms, 0.0), self.offset[:-1])[seen].mean())

    def rows_by_origin(self) -> dict[str, int]:
        """The number of rows of each origin."""
        counts = np.bincount(self.origin, minlength=len(ORIGINS)).tolist()
        return {name: count for name, count in zip(ORIGINS, counts, strict=True) if count}

    def save(self, path: Path) -> None:
        """Writes an Arrow IPC file with one record for each entry: `source` int32 (null in a row of bytes), `rest` binary (null
        in a row of a token), `pivot` int32, `weight` float32, `origin` string."""
        length = np.diff(self.offset)
        tokens = len(self.source)
        source = np.repeat(np.append(self.source, np.full(len(self.remaining_bytes), -1)), length).astype(np.int32)
        rest = np.repeat(np.append(np.full(tokens, -1), np.arange(len(self.remaining_bytes))), length).astype(np.int32)
        origin = pa.array(np.repeat(self.origin, length).astype(np.int8))
        table = pa.table(
            {
                "source": pa.array(source, mask=source < 0),
                "rest": pa.array(self.remaining_bytes, pa.binary()).take(pa.array(rest, mask=rest < 0)),
                "pivot": pa.array(self.pivot.astype(np.int32)),
                "weight": pa.array(self.weight.astype(np.float32)),
                "origin": pa.DictionaryArray.from_arrays(origin, pa.array(ORIGINS)).cast(pa.string()),
            }
        )
        with (
            atomic_file(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as file,
        ):
            file.write_table(table)


def build_map(
    seen: Seen,
    *,
    source: TokenBytes,
    back_off: BackOff,
    roles: dict[int, int],
    vocabulary: str = "statistics",
    top_1: bool = False,
    same_tokens: bool = False,
) -> VocabularyMap:
    """Builds W for all source tokens and byte strings of `seen`.

    `vocabulary`: `exact`, `edit` or `statistics` ("EM", "MinED", "MS" in the paper). `top_1` keeps only the most frequent pivot
    token of a counted row, the lowest id of equals. `roles`: see `special_token_map`. With `same_tokens` every token maps to
    itself, unless its role maps it elsewhere, and only byte strings are counted or looked up.
    """
    counts = (
        seen.pairs if vocabulary == "statistics" and not same_tokens else Counts(*(np.zeros(0, dtype=np.int64),) * 3)
    )
    tokens = np.union1d(seen.pairs.source if same_tokens else counts.source, seen.tokens)
    special = np.array(sorted(source.special | roles.keys()), dtype=np.int64)
    # A special token in a text, of either side, is plain text there: its counts are not a correspondence.
    counts = _without(counts, special, back_off.pivot.special)
    parts, remaining_bytes = _parts(seen, counted=vocabulary == "statistics")
    parts = _without(parts, np.zeros(0, dtype=np.int64), back_off.pivot.special)
    # One table of counts for both kinds of rows, with the row's index in place of the source token.
    index = np.concatenate([np.searchsorted(tokens, counts.source), len(tokens) + parts.source])
    counts = Counts(index, np.concatenate([counts.pivot, parts.pivot]), np.concatenate([counts.count, parts.count]))
    if top_1:
        counts = _most_frequent(counts)
    rows = len(tokens) + len(remaining_bytes)
    length = np.bincount(counts.source, minlength=rows)
    origin = np.full(rows, ORIGINS.index(SEEN), dtype=np.int8)
    single = np.full(rows, TAIL, dtype=np.int64)
    own = np.flatnonzero(tokens < back_off.size) if same_tokens else np.zeros(0, dtype=np.int64)
    single[own], origin[own] = tokens[own], ORIGINS.index(SAME_TOKEN)
    unseen = np.flatnonzero((length == 0) & (single == TAIL))
    data = [
        source[int(tokens[row])] if row < len(tokens) else remaining_bytes[row - len(tokens)] for row in unseen.tolist()
    ]
    lookups: dict[str, Lookup] = {
        "exact": lambda several: [back_off.same_bytes(data) for data in several],
        "edit": back_off.nearest,
        "statistics": lambda several: [back_off.lookup(data) for data in several],
    }
    found = lookups[vocabulary](data)
    for row, (target, how) in zip(unseen.tolist(), found, strict=True):
        single[row], origin[row] = target, ORIGINS.index(how)
    for row in np.flatnonzero(np.isin(tokens, special)).tolist():
        single[row] = roles.get(int(tokens[row]), int(single[row]) if same_tokens else TAIL)
        origin[row] = ORIGINS.index(SPECIAL if single[row] != TAIL else TO_TAIL)
    return _assemble(tokens, remaining_bytes, counts, length, single, origin)


def _assemble(
    tokens: np.ndarray,
    remaining_bytes: list[bytes],
    counts: Counts,
    length: np.ndarray,
    single: np.ndarray,
    origin: np.ndarray,
) -> VocabularyMap:
    """Joins counted rows and rows with one entry or none."""
    alone = np.flatnonzero(single != TAIL)
    total = np.bincount(counts.source, weights=counts.count, minlength=len(length))
    row = np.concatenate([counts.source, alone])
    order = np.argsort(row, kind="stable")
    return VocabularyMap(
        source=tokens,
        remaining_bytes=remaining_bytes,
        offset=np.concatenate([[0], np.cumsum(length + (single != TAIL))]).astype(np.int64),
        pivot=np.concatenate([counts.pivot, single[alone]])[order],
        weight=np.concatenate([counts.count / total[counts.source], np.ones(len(alone))])[order],
        origin=origin,
    )


def _without(counts: Counts, source: np.ndarray, pivot: frozenset[int]) -> Counts:
    """The counts without these source and pivot tokens."""
    keep = ~np.isin(counts.source, source) & ~np.isin(counts.pivot, np.array(sorted(pivot), dtype=np.int64))
    return Counts(counts.source[keep], counts.pivot[keep], counts.count[keep])


def _parts(seen: Seen, *, counted: bool) -> tuple[Counts, list[bytes]]:
    """All byte strings in order, and their counts, with the string's index in place of the source token."""
    parts = sorted(seen.parts.items()) if counted else []
    remaining_bytes = sorted(seen.remaining_bytes | {rest for (rest, _), _ in parts})
    index = {rest: at for at, rest in enumerate(remaining_bytes)}
    columns = [(index[rest], pivot, count) for (rest, pivot), count in parts]
    table = np.array(columns, dtype=np.int64).reshape(-1, 3)
    return Counts(table[:, 0], table[:, 1], table[:, 2]), remaining_bytes


def _most_frequent(counts: Counts) -> Counts:
    order = np.lexsort((counts.pivot, -counts.count, counts.source))
    best = order[np.append(True, np.diff(counts.source[order]) != 0)] if len(order) else order
    return Counts(counts.source[best], counts.pivot[best], counts.count[best])
