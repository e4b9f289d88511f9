"""Conversations and distributions made by hand, and choices and averages in plain loops, for tests of fusion."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from fusechat.data.distributions import (
    DistributionSet,
    SparseDistribution,
    open_distributions,
    write_distributions,
    write_store,
)
from fusechat.data.prepared import Prepared, PreparedSet, write_prepared
from fusechat.fuse.teacher_selection import Candidate, SelectionRule

FUNCTIONS, UNITS, LEVELS = ("mince", "avgce", "source"), ("byte", "token"), ("conversation", "response", "position")
VOCABULARY = 12


def prepared(identity: str, responses: list[tuple[int, int]], *, ends_turn: bool = True, first: int = 5) -> Prepared:
    """A conversation of (tokens, bytes) responses, each after a prompt of two tokens; its tokens are numbered from `first`."""
    position, response, closing, at = [], [], [], 0
    for number, (tokens, _) in enumerate(responses):
        at += 2
        rows = tokens + ends_turn
        position += range(at, at + rows)
        response += [number] * rows
        closing += [False] * tokens + [True] * ends_turn
        at += rows
    n = len(position)
    return Prepared(
        id=identity,
        input_ids=np.arange(first, first + at, dtype=np.int32),
        position=np.array(position, dtype=np.int32),
        response=np.array(response, dtype=np.int32),
        begin=np.zeros(n, dtype=np.int32),
        end=np.ones(n, dtype=np.int32),
        end_of_turn=np.array(closing, dtype=bool),
        content_bytes=np.array([size for _, size in responses], dtype=np.int32),
    )


def nll(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def sparse(rows: Sequence[Mapping[int, float]], k: int | None = None, kind: type = np.float32) -> SparseDistribution:
    """Distributions of rows {token: probability}, most likely first."""
    k = k or max([1, *map(len, rows)])
    ids, logprobs = np.full((len(rows), k), -1, np.int32), np.full((len(rows), k), -np.inf, kind)
    for index, row in enumerate(rows):
        for column, (token, share) in enumerate(sorted(row.items(), key=lambda item: -item[1])):
            ids[index, column], logprobs[index, column] = token, math.log(share)
    return SparseDistribution(ids, logprobs, nll())


def rows_of(found: SparseDistribution) -> list[dict[int, float]]:
    """The rows as {token: probability}; no token stands twice, what is padded has no probability."""
    rows = []
    for ids, logprobs in zip(found.ids.tolist(), found.logprobs.astype(np.float64).tolist(), strict=True):
        kept = [(token, math.exp(value)) for token, value in zip(ids, logprobs, strict=True) if token >= 0]
        assert len(dict(kept)) == len(kept)
        assert all(value == -math.inf for token, value in zip(ids, logprobs, strict=True) if token < 0)
        rows.append(dict(kept))
    return rows


def store(directory: Path, records: Mapping[str, SparseDistribution]) -> DistributionSet:
    directory.mkdir(parents=True)
    write_distributions(directory / "rows.arrow", records.items())
    write_store(directory, k=next(iter(records.values())).ids.shape[1], files="*.arrow")
    return open_distributions(directory)


def prepared_set(directory: Path, conversations: Sequence[Prepared]) -> PreparedSet:
    directory.mkdir(parents=True)
    write_prepared(directory / "conversations.arrow", conversations)
    return PreparedSet(directory)


# -- in plain loops -----------------------------------------------------------------------------------------------------


def naive_cross_entropy(rows: Prepared, values: Sequence[float], responses: Sequence[int], unit: str) -> float:
    """Nats per byte or token of the content of `responses`; tokens before it have nats alone."""
    nats, tokens = 0.0, 0
    for row in range(len(rows.position)):
        if rows.response[row] in responses and not rows.end_of_turn[row]:
            nats += float(values[row])
            tokens += not rows.lead[row]
    return nats / (sum(int(rows.content_bytes[one]) for one in responses) if unit == "byte" else tokens)


def naive_groups(pivot: Prepared, level: str) -> list[int]:
    n = len(pivot.position)
    return {"conversation": [0] * n, "response": pivot.response.tolist(), "position": list(range(n))}[level]


def naive_cross_entropies(candidates: Sequence[Candidate], pivot: Prepared, rule: SelectionRule) -> list[list[float]]:
    """Of each candidate in each group; the responses of a conversation are those that the pivot and all candidates have."""
    if rule.level == "position":
        return [
            [
                -math.log(max(row.get(int(pivot.input_ids[at]), 0.0), 1e-4)) if row else math.inf
                for row, at in zip(rows_of(one.targets), pivot.position, strict=True)
            ]
            for one in candidates
        ]
    number = len(pivot.content_bytes)
    if rule.level == "conversation":
        common = range(min(number, *(len(one.rows.content_bytes) for one in candidates)))
        return [[naive_cross_entropy(one.rows, one.nll, common, rule.unit)] for one in candidates]
    return [
        [
            naive_cross_entropy(one.rows, one.nll, [at], rule.unit) if at < len(one.rows.content_bytes) else math.inf
            for at in range(number)
        ]
        for one in candidates
    ]


def naive_shares(candidates: Sequence[Candidate], pivot: Prepared, rule: SelectionRule) -> list[list[float]]:
    """The weights [candidates][groups]; of AvgCE by cross-entropies per token of the pivot, whatever they are compared by."""
    found = naive_cross_entropies(candidates, pivot, rule)
    if rule.function != "avgce" or rule.unit == "token" or rule.level == "position":
        return naive_weights(found, rule.function)
    number = len(pivot.content_bytes)
    common = range(min(number, *(len(one.rows.content_bytes) for one in candidates)))
    groups = [common] if rule.level == "conversation" else [range(at, at + 1) for at in range(number)]
    for group, responses in enumerate(groups):
        tokens = sum(
            pivot.response[row] in responses and not pivot.end_of_turn[row] for row in range(len(pivot.position))
        )
        for values in found:
            values[group] *= sum(int(pivot.content_bytes[one]) for one in responses) / tokens
    return naive_weights(found, rule.function)


def naive_weights(found: Sequence[Sequence[float]], function: str) -> list[list[float]]:
    """[candidates][groups], as `fusechat.fuse.teacher_selection.weights`."""
    weights = [[0.0] * len(found[0]) for _ in found]
    for group, values in enumerate(zip(*found, strict=True)):
        if min(values) == math.inf:
            continue
        if function == "avgce":
            total = sum(math.exp(-value) for value in values)
            for index, value in enumerate(values):
                weights[index][group] = math.exp(-value) / total
        else:
            weights[values.index(min(values))][group] = 1.0
    return weights


def naive_mix(rows: Sequence[Mapping[int, float]], weights: Sequence[float]) -> dict[int, float]:
    """The average of one row of several candidates; those without any target give their weight to the others."""
    total = sum(weight for row, weight in zip(rows, weights, strict=True) if row)
    found: dict[int, float] = {}
    for row, weight in zip(rows, weights, strict=True):
        for token, share in row.items():
            if weight > 0:
                found[token] = found.get(token, 0.0) + share * weight / total
    return found


# -- for Hypothesis -----------------------------------------------------------------------------------------------------


@st.composite
def distributions(draw: Callable, n: int, k: int = 4) -> list[dict[int, float]]:
    """n rows of up to k tokens of a small vocabulary, with a tail or without; some are empty."""
    rows = []
    for _ in range(n):
        tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=k, unique=True))
        shares = [draw(st.integers(1, 50)) for _ in tokens]
        total = sum(shares) + draw(st.integers(0, 30))
        rows.append({token: share / total for token, share in zip(tokens, shares, strict=True)})
    return rows


@st.composite
def conversation_of_several(draw: Callable, models: int) -> list[Candidate]:
    """One conversation as several models see it, the first being the pivot: each cuts it into tokens of its own, may not end its
    turns, and may lose later responses; each has targets for the pivot's rows."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    sides: list[Prepared] = []
    for _ in range(models):
        kept = draw(st.integers(1, len(sizes)))
        tokens = [draw(st.integers(1, size)) for size in sizes[:kept]]
        responses = list(zip(tokens, sizes[:kept], strict=True))
        sides.append(prepared("a", responses, ends_turn=draw(st.booleans()), first=0))
    values = st.floats(0.0, 12.0, width=32)
    n = len(sides[0])
    return [
        Candidate(side, nll(*[draw(values) for _ in range(len(side))]), sparse(draw(distributions(n))))
        for side in sides
    ]
