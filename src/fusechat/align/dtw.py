"""Dynamic time warping over token surfaces, the paper's sequence alignment (FuseLLM, arXiv 2401.10491, section 3.2).

The cost of a cell is the edit distance between two surfaces, computed once for each distinct pair. A pair of the path is kept
if the surfaces are equal or one is a suffix of the other. If several tokens meet one, the pair is its last token's, so that a
kept pair ends at the same byte, and the rows after it predict the same text.
"""

from collections.abc import Sequence

import numpy as np

from fusechat.align.sequence import align_starts, number_line
from fusechat.data.prepared import Prepared
from fusechat.models.token_bytes import TokenBytes
from fusechat.run.compiled import compiled

_DIAGONAL, _SOURCE, _PIVOT = 0, 1, 2  # kinds of steps; the lower one wins a tie


def surface(data: bytes) -> str:
    """Bytes as the characters that edit distance compares. Bytes of an incomplete character differ from every character."""
    return data.decode("utf-8", errors="surrogateescape")


def warping_path(pivot: Sequence[str], source: Sequence[str]) -> np.ndarray:
    """The cheapest path from the first pair to the last: int64 [p, 2] of (pivot, source) indices. Neither side may be empty.
    Ties prefer the diagonal step, then the step along the source. Memory: n_pivot × n_source bytes."""
    distances, ours, theirs = distinct_distances(pivot, source)
    return _backtrack(_steps(distances, ours, theirs))


def distinct_distances(pivot: Sequence[str], source: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edit distances between distinct surfaces, int32 [u, v], and the index of each token's surface, int64 [n] and [m]."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    (some, ours), (others, theirs) = _distinct(pivot), _distinct(source)
    distances = cdist(some, others, scorer=Levenshtein.distance, dtype=np.int32, workers=1)
    return distances, ours, theirs


def kept_pairs(path: np.ndarray, pivot: Sequence[str], source: Sequence[str]) -> list[tuple[int, int]]:
    """The (pivot, source) pairs of a path where both tokens end: the last of each run, if one surface ends with the other."""
    last = np.append((np.diff(path, axis=0) == 1).all(axis=1), True)
    return [(i, j) for i, j in path[last].tolist() if pivot[i].endswith(source[j]) or source[j].endswith(pivot[i])]


def dtw_rows(pivot: Prepared, source: Prepared, spell: tuple[TokenBytes, TokenBytes]) -> np.ndarray:
    """For each pivot row, the corresponding source row or -1: int64 [n_pivot]. Each response is warped by itself. The first
    content rows of a response correspond, and the rows after each kept pair; end-of-turn rows as in `align_rows`."""
    ours, theirs = number_line(pivot, source)
    result = np.where(pivot.end_of_turn, align_starts(ours, theirs), -1)
    for response in np.intersect1d(pivot.response, source.response).tolist():
        rows = [_content_rows(side, response) for side in (pivot, source)]
        if not len(rows[0]) or not len(rows[1]):
            continue
        surfaces = [_surfaces(side, r, table) for side, r, table in zip((pivot, source), rows, spell, strict=True)]
        pairs = kept_pairs(warping_path(*surfaces), *surfaces)
        for i, j in [(-1, -1), *pairs]:
            if i + 1 < len(rows[0]) and j + 1 < len(rows[1]):
                result[rows[0][i + 1]] = rows[1][j + 1]
    return result


def _distinct(surfaces: Sequence[str]) -> tuple[list[str], np.ndarray]:
    index: dict[str, int] = {}
    where = np.array([index.setdefault(text, len(index)) for text in surfaces], dtype=np.int64)
    return list(index), where


def _content_rows(rows: Prepared, response: int) -> np.ndarray:
    """The rows of a response's content that have a width."""
    wide = rows.end > np.maximum(rows.begin, 0)
    return np.flatnonzero((rows.response == response) & ~rows.end_of_turn & ~rows.lead & wide)


def _surfaces(rows: Prepared, which: np.ndarray, table: TokenBytes) -> list[str]:
    """The tokens' surfaces, without the bytes of the template that they cover before the content."""
    tokens, clip = rows.gold[which].tolist(), np.maximum(-rows.begin[which], 0).tolist()
    return [surface(table[token][taken:]) for token, taken in zip(tokens, clip, strict=True)]


@compiled()
def _steps(distances: np.ndarray, pivot: np.ndarray, source: np.ndarray) -> np.ndarray:
    """uint8 [n, m]: the kind of the last step on the cheapest path to each cell."""
    n, m = len(pivot), len(source)
    steps = np.empty((n, m), dtype=np.uint8)
    cost = np.empty(m, dtype=np.int64)  # of the row above, overwritten from left to right
    for i in range(n):
        row = distances[pivot[i]]
        diagonal = np.int64(0)
        for j in range(m):
            above = cost[j]
            if i == 0 and j == 0:
                best, step = np.int64(0), _DIAGONAL
            elif i == 0:
                best, step = cost[j - 1], _SOURCE
            elif j == 0:
                best, step = above, _PIVOT
            else:
                best, step = diagonal, _DIAGONAL
                if cost[j - 1] < best:
                    best, step = cost[j - 1], _SOURCE
                if above < best:
                    best, step = above, _PIVOT
            diagonal = above
            cost[j] = best + row[source[j]]
            steps[i, j] = step
    return steps


@compiled()
def _backtrack(steps: np.ndarray) -> np.ndarray:
    i, j = steps.shape[0] - 1, steps.shape[1] - 1
    path = np.empty((i + j + 1, 2), dtype=np.int64)
    at = len(path) - 1
    path[at] = i, j
    while i > 0 or j > 0:
        step = steps[i, j]
        if step != _SOURCE:
            i -= 1
        if step != _PIVOT:
            j -= 1
        at -= 1
        path[at] = i, j
    return path[at:].copy()
