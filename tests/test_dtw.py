"""Dynamic time warping against a plain dynamic programme, and against all paths where they are few."""

from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aligning import conversation, edit_distance, prepared, toy
from cases import each
from fusechat.align.dtw import distinct_distances, dtw_rows, kept_pairs, surface, warping_path
from fusechat.align.sequence import align_rows
from fusechat.data.prepared import Prepared

Path = list[tuple[int, int]]


def surfaces(most: int = 7) -> st.SearchStrategy[list[str]]:
    """Few letters and short words, so that ties abound."""
    return st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=most)


def naive_path(pivot: Sequence[str], source: Sequence[str]) -> Path:
    """Cell by cell; of equally cheap ways to a cell the diagonal one, then that along the source, then along the pivot."""
    cost: dict[tuple[int, int], int] = {}
    came: dict[tuple[int, int], tuple[int, int]] = {}
    for i, ours in enumerate(pivot):
        for j, theirs in enumerate(source):
            ways = [way for way in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if way in cost]
            cost[i, j] = edit_distance(ours, theirs)
            if ways:
                came[i, j] = min(ways, key=lambda way: cost[way])  # the first of equals
                cost[i, j] += cost[came[i, j]]
    path = [(len(pivot) - 1, len(source) - 1)]
    while path[-1] in came:
        path.append(came[path[-1]])
    return path[::-1]


def all_paths(n: int, m: int, begin: tuple[int, int] = (0, 0)) -> Iterator[Path]:
    i, j = begin
    if begin == (n - 1, m - 1):
        yield [begin]
    for after in ((i + 1, j + 1), (i, j + 1), (i + 1, j)):
        if after[0] < n and after[1] < m:
            yield from ([begin, *rest] for rest in all_paths(n, m, after))


def cost_of(path: Path, pivot: Sequence[str], source: Sequence[str]) -> int:
    return sum(edit_distance(pivot[i], source[j]) for i, j in path)


def pairs_of(path: np.ndarray) -> Path:
    return [(i, j) for i, j in path.tolist()]


@given(surfaces(), surfaces())
def test_the_path_is_that_of_the_plain_dynamic_programme(pivot: list[str], source: list[str]) -> None:
    path = warping_path(pivot, source)
    assert path.dtype == np.int64
    assert pairs_of(path) == naive_path(pivot, source)


@given(surfaces(), surfaces())
def test_a_path_goes_from_the_first_pair_to_the_last_by_single_steps(pivot: list[str], source: list[str]) -> None:
    path = warping_path(pivot, source)
    assert path[0].tolist() == [0, 0]
    assert path[-1].tolist() == [len(pivot) - 1, len(source) - 1]
    assert {tuple(step) for step in np.diff(path, axis=0).tolist()} <= {(1, 1), (0, 1), (1, 0)}


@given(surfaces(4), surfaces(4))
def test_no_path_is_cheaper(pivot: list[str], source: list[str]) -> None:
    cheapest = min(cost_of(path, pivot, source) for path in all_paths(len(pivot), len(source)))
    assert cost_of(pairs_of(warping_path(pivot, source)), pivot, source) == cheapest


def test_where_all_costs_are_equal_the_path_ends_diagonally() -> None:
    """Found backwards from the end: the diagonal first, and what is left over at the beginning along the longer side."""
    assert pairs_of(warping_path(["x"] * 2, ["x"] * 4)) == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert pairs_of(warping_path(["x"] * 4, ["x"] * 2)) == [(0, 0), (1, 0), (2, 0), (3, 1)]


def test_of_the_other_two_steps_the_one_along_the_source_is_preferred() -> None:
    """Two paths cost 2, one for the first pair and one for the last; into (2, 2) one goes along the source, one along the pivot."""
    pivot, source = ["a", "b", "a"], ["b", "a", "b"]
    assert cost_of([(0, 0), (1, 0), (2, 1), (2, 2)], pivot, source) == 2
    assert cost_of([(0, 0), (0, 1), (1, 2), (2, 2)], pivot, source) == 2
    assert pairs_of(warping_path(pivot, source)) == [(0, 0), (1, 0), (2, 1), (2, 2)]


@each("length", [1, 2, 5])
def test_one_token_against_several_goes_along_them(length: int) -> None:
    several = ["ab", "b", "a", "ba", "b"][:length]
    assert pairs_of(warping_path(["ab"], several)) == [(0, j) for j in range(length)]
    assert pairs_of(warping_path(several, ["ab"])) == [(i, 0) for i in range(length)]


@given(surfaces(), surfaces())
def test_distances_are_edit_distances_of_distinct_surfaces(pivot: list[str], source: list[str]) -> None:
    distances, ours, theirs = distinct_distances(pivot, source)
    assert distances.shape == (len(set(pivot)), len(set(source)))
    expected = [[edit_distance(one, other) for other in source] for one in pivot]
    assert distances[np.ix_(ours, theirs)].tolist() == expected


# -- the pairs that are kept --------------------------------------------------------------------------------------------


def kept(pivot: list[str], source: list[str]) -> Path:
    return kept_pairs(warping_path(pivot, source), pivot, source)


def test_banana_meets_the_last_na_and_not_the_one_in_the_middle() -> None:
    assert kept(["banana", " split"], ["ba", "na", "na", " split"]) == [(0, 2), (1, 3)]
    assert kept(["ba", "na", "na", " split"], ["banana", " split"]) == [(2, 0), (3, 1)]


def test_equal_surfaces_are_kept() -> None:
    assert kept(["a", "bc", "d"], ["a", "bc", "d"]) == [(0, 0), (1, 1), (2, 2)]


def test_surfaces_of_which_neither_ends_the_other_are_dropped() -> None:
    assert kept(["ab", "c"], ["ba", "c"]) == [(1, 1)]
    assert kept(["banana"], ["bana", "n", "as"]) == []


def test_only_the_beginning_in_common_is_not_enough() -> None:
    assert kept(["ba"], ["banana"]) == []


def naive_kept(path: Path, pivot: Sequence[str], source: Sequence[str]) -> Path:
    """Runs of pairs that share a token with the pair before; of each the last, where one surface is a suffix of the other."""
    runs: list[Path] = []
    for i, j in path:
        if runs and (runs[-1][-1][0] == i or runs[-1][-1][1] == j):
            runs[-1].append((i, j))
        else:
            runs.append([(i, j)])
    found = []
    for i, j in (run[-1] for run in runs):
        short, long = sorted((pivot[i], source[j]), key=len)
        if long[len(long) - len(short) :] == short:
            found.append((i, j))
    return found


@given(surfaces(), surfaces())
def test_kept_pairs_are_the_last_of_their_runs(pivot: list[str], source: list[str]) -> None:
    assert kept(pivot, source) == naive_kept(naive_path(pivot, source), pivot, source)


@given(surfaces(), surfaces())
def test_no_token_is_kept_twice(pivot: list[str], source: list[str]) -> None:
    pairs = kept(pivot, source)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)


def test_bytes_of_a_part_of_a_character_are_a_surface_of_their_own() -> None:
    whole, first, last = surface("日".encode()), surface(b"\xe6"), surface(b"\x97\xa5")
    assert whole == "日"
    assert len({whole, first, last, surface(b"\x97"), surface(b"?")}) == 5
    assert surface(b"a\xe6")[0] == "a"
    assert kept([first, last], [first, last]) == [(0, 0), (1, 1)]
    assert kept([whole], [first, last]) == []  # by bytes it would end with the last


# -- rows of conversations ----------------------------------------------------------------------------------------------

PIECES = ["a", "b", "ab", "ba", "aab", "banana", "na", " split", "日", b"\xe6", b"\x97\xa5"]
TABLE = toy(*PIECES)
END = len(PIECES)


def ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def told(*responses: list[int], ends: int | None = END, taken: Sequence[int] = ()) -> Prepared:
    return conversation(TABLE, *responses, ends=ends, taken=taken)


BANANA = told(ids("banana", " split"))
PARTS = told(ids("ba", "na", "na", " split"))
BA, WHOLE, CLIPPED = (
    told(ids(first, "b"), ends=None, taken=[taken]) for first, taken in (("ba", 0), ("banana", 0), ("banana", 5))
)


@each("pivot, source, expected", [
    # rows after a kept pair correspond, and the first ones
    (BANANA, PARTS, [0, 3, 4]),
    (PARTS, BANANA, [0, -1, -1, 1, 2]),
    # a row after a pair that was dropped has none
    (told(ids("ab", " split", "a"), ends=None), told(ids("a", "ba", "a"), ends=None), [0, -1, -1]),
    # the template before the content is no part of a surface: of five letters of `banana`, what is left, `a`, ends `ba`
    (BA, WHOLE, [0, -1]),
    (BA, CLIPPED, [0, 1]),
    # responses are warped apart, and their ends of turn joined; in one go, the second response's `ab` would be warped with what
    # is left of the first
    (told(ids("banana"), ids("ab", "a")), told(ids("ba", "na", "na"), ids("a", "b", "a")), [0, 3, 4, 6, 7]),
    # a response that one model lost has no rows
    (told(ids("a", "b"), ids("ab")), told(ids("a", "b")), [0, 1, 2, -1, -1]),
    (told(ids("a", "b")), told(ids("a", "b"), ids("ab")), [0, 1, 2]),
])  # fmt: skip
def test_rows_by_hand(pivot: Prepared, source: Prepared, expected: list[int]) -> None:
    assert dtw_rows(pivot, source, (TABLE, TABLE)).tolist() == expected


def test_rows_without_width_never_correspond() -> None:
    with_prefix = prepared([([(0, 0), (0, 1), (1, 2)], True)], [3, *ids("a", "b"), END])
    without = conversation(TABLE, ids("a", "b"), ends=END)
    assert dtw_rows(with_prefix, without, (TABLE, TABLE)).tolist() == [-1, 0, 1, 2]
    assert dtw_rows(without, with_prefix, (TABLE, TABLE)).tolist() == [1, 2, 3]


def naive_rows(pivot: Prepared, source: Prepared) -> list[int]:
    result = [-1] * len(pivot)
    for response in {*pivot.response.tolist()} & {*source.response.tolist()}:
        rows: list[list[int]] = []
        texts: list[list[str]] = []
        for side in (pivot, source):
            found = [i for i in range(len(side)) if side.response[i] == response]
            rows.append([i for i in found if not side.end_of_turn[i] and side.end[i] > max(side.begin[i], 0)])
            first = [max(0, -int(side.begin[i])) for i in rows[-1]]
            texts.append([surface(TABLE[int(side.gold[i])][cut:]) for i, cut in zip(rows[-1], first, strict=True)])
            if side.end_of_turn[found[-1]]:
                rows[-1].append(found[-1])
        path = naive_path(*texts)
        for i, j in [(-1, -1), *naive_kept(path, *texts)]:
            if i + 1 < len(texts[0]) and j + 1 < len(texts[1]):
                result[rows[0][i + 1]] = rows[1][j + 1]
        if len(rows[0]) > len(texts[0]) and len(rows[1]) > len(texts[1]):
            result[rows[0][-1]] = rows[1][-1]
    return result


TOKENS = st.lists(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=6), min_size=1, max_size=3)


@given(TOKENS, TOKENS, st.booleans())
def test_rows_are_those_of_the_plain_dynamic_programme(one: list[list[int]], other: list[list[int]], end: bool) -> None:
    pivot, source = conversation(TABLE, *one, ends=END), conversation(TABLE, *other, ends=END if end else None)
    assert dtw_rows(pivot, source, (TABLE, TABLE)).tolist() == naive_rows(pivot, source)


def test_an_alignment_takes_warped_rows_and_looks_inside_where_they_have_none() -> None:
    pivot, source = conversation(TABLE, ids("ba", "na", "na")), conversation(TABLE, ids("banana"))
    alignment = align_rows(pivot, source, dtw_rows(pivot, source, (TABLE, TABLE)))
    assert alignment.source_row.tolist() == [0, -1, -1]
    assert alignment.inside_row.tolist() == [-1, 0, 0]
    assert alignment.given.tolist() == [0, 2, 4]
