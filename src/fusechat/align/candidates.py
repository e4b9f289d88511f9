"""What a source predicts at each pivot row, before the vocabulary map: rows of W with their mass. See docs/alignment.md."""

from dataclasses import dataclass

import numpy as np

from fusechat.align.sequence import Alignment
from fusechat.align.spelling import Spelling
from fusechat.align.vocabulary import VocabularyMap
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.models.token_bytes import TokenBytes

NONE = -1


@dataclass(frozen=True)
class Candidates:
    """`row` int64 [n, c]: rows of W, or -1. `mass` float64 [n, c]: probabilities, with a sum of at most 1 in a row.

    With the chain rule the last candidate is the source's own token, if its mass is known: `own` bool [n]. `chained` float64
    [n]: the probability of the pivot's gold token given that token, or NaN.
    """

    row: np.ndarray
    mass: np.ndarray
    own: np.ndarray
    chained: np.ndarray


@dataclass(frozen=True)
class Remainders:
    """Bytes that remain of candidates: item i belongs to `pivot_row[i]` and to `column[i]` of the captured distribution
    (int64). `mass` float64: its probability. `data`: its bytes, empty if none remain and the mass joins the tail."""

    pivot_row: np.ndarray
    column: np.ndarray
    mass: np.ndarray
    data: list[bytes]


def remainders_inside(
    alignment: Alignment, source: Prepared, captured: SparseDistribution, *, tokens: TokenBytes, spelling: Spelling
) -> Remainders:
    """For pivot tokens that start inside a source token: the source's distribution at that token, given its first bytes.

    Kept candidates that begin with these bytes remain, renormalised. The mass of one with no bytes left joins the tail, because
    what follows it is unknown.
    """
    rows = np.flatnonzero(alignment.inside)
    source_rows, given = alignment.inside_row[rows], alignment.given[rows]
    candidates = captured.ids[source_rows]
    left = spelling.left_over(candidates, source.gold[source_rows], given)
    mass = np.where(left >= 0, captured.take(source_rows).probabilities, 0.0)
    total = mass.sum(axis=1, keepdims=True)
    mass = np.divide(mass, total, out=mass, where=total > 0)
    at, column = np.nonzero(left > 0)
    begin = given[at].tolist()
    data = [tokens[token][first:] for token, first in zip(candidates[at, column].tolist(), begin, strict=True)]
    return Remainders(rows[at], column, mass[at, column], data)


def remainders_clipped(
    alignment: Alignment,
    pivot: Prepared,
    source: Prepared,
    captured: SparseDistribution,
    *,
    spell: tuple[TokenBytes, TokenBytes],
) -> Remainders:
    """For tokens that cover template text before the content (`▁Hello`): replaces the source's template bytes by the pivot's.
    Candidates without the source's template bytes join the tail. Rows where both tokens cover the same text use whole tokens."""
    found: list[tuple[int, int, float, bytes]] = []
    clipped = np.flatnonzero(alignment.aligned & ~alignment.unclipped & ~alignment.whole)
    probabilities = captured.take(alignment.source_row[clipped]).probabilities
    for at, pivot_row in enumerate(clipped.tolist()):
        source_row = int(alignment.source_row[pivot_row])
        put = spell[0][int(pivot.gold[pivot_row])][: int(alignment.pivot_clip[pivot_row])]
        taken = spell[1][int(source.gold[source_row])][: int(alignment.source_clip[pivot_row])]
        for column, candidate in enumerate(captured.ids[source_row].tolist()):
            if candidate >= 0 and candidate not in spell[1].special:
                data = spell[1][candidate]
                rest = put + data[len(taken) :] if data.startswith(taken) and len(data) > len(taken) else b""
                found.append((pivot_row, column, float(probabilities[at, column]), rest))
    return Remainders(
        pivot_row=np.array([row for row, _, _, _ in found], dtype=np.int64),
        column=np.array([column for _, column, _, _ in found], dtype=np.int64),
        mass=np.array([mass for _, _, mass, _ in found], dtype=np.float64),
        data=[data for _, _, _, data in found],
    )


def gather(
    alignment: Alignment, captured: SparseDistribution, vocabulary_map: VocabularyMap, several: list[Remainders]
) -> Candidates:
    """The candidates of every pivot row: whole source tokens at aligned rows, and the remaining bytes in `several`."""
    n, k = len(alignment.source_row), captured.ids.shape[1]
    row, mass = np.full((n, k), NONE, dtype=np.int64), np.zeros((n, k))
    aligned = np.flatnonzero(alignment.source_row >= 0)
    source_rows = alignment.source_row[aligned]
    ids = captured.ids[source_rows]
    whole = np.full(ids.shape, NONE, dtype=np.int64)
    whole[ids >= 0] = vocabulary_map.rows_of(ids[ids >= 0])
    row[aligned], mass[aligned] = whole, captured.take(source_rows).probabilities
    for remainders in several:
        known = vocabulary_map.row_of_remainder
        row[remainders.pivot_row, remainders.column] = [known[data] if data else NONE for data in remainders.data]
        mass[remainders.pivot_row, remainders.column] = remainders.mass
    return Candidates(row, mass, own=np.zeros(n, dtype=bool), chained=np.full(n, np.nan))
