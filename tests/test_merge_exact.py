"""Every merging method but SLERP against exact arithmetic on one element at a time."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cases import each
from fusechat.merge.kernels import CHUNK
from fusechat.merge.random import keep_mask, tensor_key
from merging import Row, floats, merged

Problem = tuple[Sequence[int], Sequence[Sequence[int]]]  # the base, and the targets' updates
Counts = tuple[int, int, int]
ZERO = Fraction(0)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Whole numbers: sums and, by the factor 3 in the deltas, the means of up to four targets are exact in float32."""
    size, targets = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    row = st.lists(st.integers(-3, 3).map(lambda value: 3 * value), min_size=size, max_size=size)
    base = draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size))
    return base, draw(st.lists(row, min_size=targets, max_size=targets))


def large_problem() -> Problem:
    """Of three blocks, the last with a part of a chunk."""
    generator = np.random.default_rng(0)
    size = 2 * CHUNK + 1500
    return generator.integers(-8, 9, size).tolist(), (3 * generator.integers(-3, 4, (3, size))).tolist()


WEIGHTS = st.sampled_from([-1.5, -1.0, -0.25, 0.0, 0.25, 0.5, 1.0, 1.75])  # which are exact, and so are their sums
DENSITIES = st.sampled_from([0.0, 0.01, 0.1, 0.29, 0.34, 0.5, 0.75, 0.99, 1.0])
LAMBDAS = st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0])


def of_each(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=4, max_size=4)


def models(problem: Problem) -> tuple[Row, list[Row]]:
    base, deltas = problem
    return floats(*base), [floats(*base) + floats(*delta) for delta in deltas]


def naive_sce(
    problem: Problem, *, select_topk: float, select_deltas: bool, normalize: bool
) -> tuple[list[Fraction], list[Fraction], Counts]:
    """(merged, coefficients, counts) by Algorithm 1."""
    base, deltas = problem
    targets, size = len(deltas), len(base)
    chosen = set(range(size))
    if select_topk < 1 and targets > 1:
        variance = []
        for i in range(size):
            mean = Fraction(sum(delta[i] for delta in deltas), targets)
            variance.append(sum((delta[i] - mean) ** 2 for delta in deltas) / targets)
        keep = int(select_topk * sum(value != 0 for value in variance))
        chosen = set(sorted(range(size), key=lambda i: (-variance[i], i))[:keep])
    selected = [[value if i in chosen else 0 for i, value in enumerate(delta)] for delta in deltas]
    squares = [sum(value**2 for value in delta) for delta in selected]
    total = sum(squares)
    eta = [Fraction(square, total) if total else Fraction(1, targets) for square in squares]
    used = selected if select_deltas else deltas
    result, left_count = [], 0
    for i in range(size):
        positive = sum(delta[i] for delta in used) >= 0
        left = [j for j in range(targets) if used[j][i] != 0 and (used[j][i] > 0) == positive]
        left_count += len(left)
        update = sum((eta[j] * used[j][i] for j in left), ZERO)
        weight = sum((eta[j] for j in left), ZERO)
        if normalize:
            update = update / weight if weight else ZERO
        result.append(base[i] + update)
    moved = sum(value != 0 for delta in used for value in delta)
    return result, eta, ((len(chosen) if select_deltas else size) * targets, moved, left_count)


def check_sce(problem: Problem, values: dict[str, Any], **how: int) -> None:
    exact, eta, counts = naive_sce(problem, **values)
    out, measured, found = merged("sce", *models(problem), values=values, **how)
    assert out == pytest.approx(np.array(exact, np.float64), abs=1e-5)
    assert measured.coefficients == pytest.approx(np.array(eta, np.float64), rel=1e-12)
    assert found == counts


SELECT = [0.0, 0.1, 0.29, 0.34, 0.5, 0.75, 0.99, 1.0, 2.0]


@given(problem=problems(), select_topk=st.sampled_from(SELECT), select_deltas=st.booleans(), normalize=st.booleans())
@example(problem=([0, 0], [[3, 0], [0, 0]]), select_topk=0.5, select_deltas=True, normalize=True)
def test_sce(problem: Problem, select_topk: float, select_deltas: bool, normalize: bool) -> None:
    check_sce(problem, {"select_topk": select_topk, "select_deltas": select_deltas, "normalize": normalize})


def test_sce_over_several_blocks() -> None:
    for select_deltas in (True, False):
        how = {"select_topk": 0.3, "select_deltas": select_deltas, "normalize": True}
        check_sce(large_problem(), how, block=CHUNK)


@each("most", [3, 10**6])
def test_sce_of_so_many_elements_that_a_sample_is_looked_at_first(most: int) -> None:
    """With whole numbers still, in NumPy: 513 chunks, a tenth of which is selected."""
    deltas = np.random.default_rng(most).integers(-most, most + 1, (3, 513 * CHUNK + 7))
    variance = 3 * (deltas**2).sum(axis=0) - deltas.sum(axis=0) ** 2
    deltas[:, np.argsort(-variance, kind="stable")[int(0.1 * np.count_nonzero(variance)) :]] = 0
    squares = (deltas**2).sum(axis=1)
    left = np.where(deltas.sum(axis=0) >= 0, deltas > 0, deltas < 0)
    weight = left.T @ (squares / squares.sum())
    exact = (left * deltas).T @ (squares / squares.sum()) / np.where(weight > 0, weight, 1)
    targets = np.random.default_rng(most).integers(-most, most + 1, deltas.shape).astype(np.float32)
    out, measured, counts = merged(
        "sce", np.zeros(deltas.shape[1], np.float32), list(targets), values={"select_topk": 0.1}
    )
    assert measured.squares.tolist() == pytest.approx(squares.tolist(), rel=1e-13)
    assert np.abs(out - exact).max() < 1e-6 * most
    assert counts[1:] == (np.count_nonzero(deltas), np.count_nonzero(left))


def check_varm(problem: Problem, **how: int) -> None:
    base, deltas = problem
    squares = [sum(value**2 for value in delta) for delta in deltas]
    total = sum(squares)
    weights = [Fraction(square, total) if total else Fraction(1, len(deltas)) for square in squares]
    targets = [[own + value for own, value in zip(base, delta, strict=True)] for delta in deltas]
    exact = [sum(w * row[i] for w, row in zip(weights, targets, strict=True)) for i in range(len(base))]
    out, measured, _ = merged("varm", *models(problem), **how)
    assert out == pytest.approx(np.array(exact, np.float64), abs=1e-5)
    assert measured.coefficients == pytest.approx(np.array(weights, np.float64), rel=1e-12)


@given(problems())
def test_varm(problem: Problem) -> None:
    check_varm(problem)


def check_linear(rows: Sequence[Sequence[int]], weight: list[float], normalize: bool, **how: int) -> None:
    divisor = Fraction(sum(weight)) if normalize else Fraction(1)
    exact = [sum(Fraction(w) * row[i] for w, row in zip(weight, rows, strict=True)) for i in range(len(rows[0]))]
    values = {"weight": weight, "normalize": normalize}
    out, _, _ = merged("linear", None, [floats(*row) for row in rows], values=values, **how)
    assert out == pytest.approx(np.array(exact, np.float64) / float(divisor), rel=1e-6, abs=1e-5)


@given(problem=problems(), weight=of_each(WEIGHTS), normalize=st.booleans())
def test_linear(problem: Problem, weight: list[float], normalize: bool) -> None:
    _, rows = problem
    weight = weight[: len(rows)]
    check_linear(rows, weight, normalize and sum(weight) != 0)


Masks = Sequence[Sequence[bool]]  # of each target, which updates are kept


def trimmed(deltas: Sequence[Sequence[int]], density: Sequence[float]) -> Masks:
    """Of each target its share of largest updates, at least one, and of equals the first."""
    masks = []
    for delta, share in zip(deltas, density, strict=True):
        count = len(delta) if share >= 1 else max(1, int(share * len(delta))) if share > 0 else 0
        chosen = set(sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), i))[:count])
        masks.append([i in chosen for i in range(len(delta))])
    return masks


def dropped(deltas: Sequence[Sequence[int]], density: Sequence[float], seed: int) -> Masks:
    masks = []
    for target, share in enumerate(density):
        mask = np.ones(len(deltas[0]), np.bool_)
        keep_mask(tensor_key(seed, "tensor"), target, 0, share, mask)
        masks.append(mask.tolist())
    return masks


def check_task(method: str, problem: Problem, masks: Masks, values: dict[str, Any], **how: int) -> None:
    """The generalised task arithmetic, as mergekit defines it, with the signs' election for methods that end in `ties`."""
    base, deltas = problem
    weight = [Fraction(w) for w in values["weight"]]
    sparse, scales = [], []
    for delta, mask in zip(deltas, masks, strict=True):
        sparse.append([value if kept else 0 for value, kept in zip(delta, mask, strict=True)])
        before, after = (sum(abs(value) for value in row) for row in (delta, sparse[-1]))
        scales.append(Fraction(before, after) if values.get("rescale") and after else Fraction(1))
    exact, left, undecided = [], 0, set()
    for i, own in enumerate(base):
        parts = [(w, w * s * row[i]) for w, s, row in zip(weight, scales, sparse, strict=True)]
        divisor = sum(w for w, _ in parts)
        moved = [(w, value) for (w, value), row in zip(parts, sparse, strict=True) if row[i] != 0]
        if method.endswith("ties"):
            total = sum(value for _, value in parts)
            if total == 0 and any(scale.denominator & (scale.denominator - 1) for scale in scales):
                undecided.add(i)  # the sum is zero in exact arithmetic only
            moved = [(w, value) for w, value in moved if value != 0 and (value > 0) == (total >= 0)]
            divisor = sum(w for w, _ in moved)
        left += len(moved)
        update = sum((value for _, value in moved), ZERO)
        exact.append(own + update / (divisor if values["normalize"] and divisor else 1) * Fraction(values["lambda"]))
    out, _, counts = merged(method, *models(problem), values=values, **how)
    decided = [i for i in range(len(base)) if i not in undecided]
    assert out[decided] == pytest.approx(np.array(exact, np.float64)[decided], rel=1e-5, abs=1e-4)
    assert counts[0] == sum(sum(mask) for mask in masks)
    assert counts[1] == sum(value != 0 for row in sparse for value in row)
    assert undecided or counts[2] == left


FAMILY: dict[str, Any] = {"weight": of_each(WEIGHTS), "normalize": st.booleans(), "lambda": LAMBDAS}
SPARSE: dict[str, Any] = {**FAMILY, "density": of_each(DENSITIES), "rescale": st.booleans()}


def cut(problem: Problem, values: dict[str, Any]) -> dict[str, Any]:
    """Values for as many targets as the problem has."""
    return {name: value[: len(problem[1])] if isinstance(value, list) else value for name, value in values.items()}


@given(problem=problems(), values=st.fixed_dictionaries(FAMILY))
@example(([1, 2], [[3, 6], [-3, 3]]), {"weight": [0.5, -0.5], "normalize": True, "lambda": 2.0})
def test_task_arithmetic(problem: Problem, values: dict[str, Any]) -> None:
    masks = [[True] * len(delta) for delta in problem[1]]
    check_task("task_arithmetic", problem, masks, cut(problem, values))


@given(problem=problems(), values=st.fixed_dictionaries(SPARSE))
def test_ties(problem: Problem, values: dict[str, Any]) -> None:
    values = cut(problem, values)
    check_task("ties", problem, trimmed(problem[1], values["density"]), values)


@each("method", ["dare_linear", "dare_ties"])
@given(problem=problems(), values=st.fixed_dictionaries({**SPARSE, "seed": st.integers(0, 1 << 40)}))
def test_dare(method: str, problem: Problem, values: dict[str, Any]) -> None:
    values = cut(problem, values)
    check_task(method, problem, dropped(problem[1], values["density"], values["seed"]), values)


def test_others_over_several_blocks() -> None:
    problem = large_problem()
    check_varm(problem, block=CHUNK)
    check_linear(problem[1], [0.25, -0.5, 1.0], True, block=CHUNK)
    values: dict[str, Any] = {"weight": [1.0, -0.25, 0.5], "normalize": True, "lambda": 0.3}
    check_task("task_arithmetic", problem, [[True] * len(problem[0])] * 3, values, block=CHUNK)
    values |= {"density": [0.3, 0.9, 1.0], "rescale": True}
    check_task("ties", problem, trimmed(problem[1], values["density"]), values, block=CHUNK)
    for method in ("dare_linear", "dare_ties"):
        check_task(method, problem, dropped(problem[1], values["density"], 0), values, block=CHUNK)
