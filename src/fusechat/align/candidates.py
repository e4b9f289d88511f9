"""What a source says at each pivot row, before the vocabulary map: rows of W with their mass. See docs/alignment.md."""

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
    """`row` int64 [n, c]: rows of W, -1 for none; `mass` float64 [n, c], at most one a row.

    With the chain rule the last candidate is the source's own token, where its mass is known: `own` bool [n]. `chained` float64
    [n]: the probability of the pivot's own token given that token, NaN where not known."""

    row: np.ndarray
    mass: np.ndarray
    own: np.ndarray
    chained: np.ndarray


@dataclass(frozen=True)
class Remainders:
    """Bytes that candidates have left, at [i] `pivot_row[i]` int64, `column[i]` int64 of the captured distribution. `mass` float64:
    what the candidate has; `data`: the bytes, empty where it has none left and goes to the tail."""

    pivot_row: np.ndarray
    column: np.ndarray
    mass: np.ndarray
    data: list[bytes]


def remainders_inside(
    alignment: Alignment, source: Prepared, captured: SparseDistribution, *, tokens: TokenBytes, spelling: Spelling
) -> Remainders:
    """Where a pivot token starts inside a source token: the source's distribution at that token, given its bytes before.

    Of the kept candidates those that begin with the bytes given stay, their mass divided by that of all of them; one that has
    nothing left goes to the tail, because what follows it is not known.
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
    """Where a token takes in template text before the content (`▁Hello`): a candidate loses what the source's own token took in,
    and gets what the pivot's did; one that does not begin with it goes to the tail. Not where both take in the same: those go over
    whole."""
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
    """The candidates of every pivot row: whole source tokens where rows are aligned, and the bytes that `several` have left."""
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
