"""Every merging method on numbers worked out by hand."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from cases import each
from fusechat.errors import RecipeError
from fusechat.merge.kernels import CHUNK
from fusechat.merge.methods import load_method, method_names
from merging import floats, merged

TEN = floats(10, 10, 10, 10, 10)
WEIGHED = {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"}


def fused(
    method: str, base: np.ndarray, *deltas: list[float], **values: Any
) -> tuple[np.ndarray, Any, tuple[int, ...]]:
    """Merges what has these updates from the base."""
    return merged(method, base, [base + floats(*delta) for delta in deltas], values=values)


def test_all_methods_are_tested_here() -> None:
    assert method_names() == sorted({*WEIGHED, "sce", "slerp", "varm"})


@each("values, expected, counted", [
    ({}, [10 + 22 / 9, 12, 10, 10, 10], (4, 4, 3)),
    # equation 9 as printed: at 1 the 2 is left with its coefficient, 5/18
    ({"normalize": False}, [10 + 22 / 9, 10 + 10 / 18, 10, 10, 10], (4, 4, 3)),
    # at 2 both agree, at 3 the sum is zero and the 1 stays, at 4 the 0.5; of ten updates three are erased
    ({"select_deltas": False}, [10 + 22 / 9, 12, 11, 11, 10.5], (10, 10, 7)),
])  # fmt: skip
def test_sce_by_hand_with_every_step(values: dict[str, Any], expected: list[float], counted: tuple[int, ...]) -> None:
    """Variances 1, 4, 0, 1, 0.25: of four that are not zero, int(0.5 · 4) = 2 stay: the 4, and of the two 1 the first.

    Selected δ: (3, -2) and (1, 2). η = 13/18 and 5/18. At 0 both are positive: (13·3 + 5·1) / 18 / 1 = 22/9. At 1 the sum
    is zero, which counts as positive: -2 is erased, 2 stays alone.
    """
    out, measured, counts = fused("sce", TEN, [3, -2, 1, 1, 0.5], [1, 2, 1, -1, -0.5], select_topk=0.5, **values)
    assert measured.coefficients == pytest.approx([13 / 18, 5 / 18], rel=1e-12)
    assert measured.squares.tolist() == [13, 5]
    assert measured.selection.counts.tolist() == [2]
    assert out == pytest.approx(expected, rel=1e-6)
    assert counts == counted


def test_sce_gives_ties_in_variance_to_the_lower_index_in_flat_order() -> None:
    """Variance 1 everywhere: int(0.5 · 4) = 2 stay, and η = (1, 0). In two dimensions three positions differ: int(0.67 · 3) = 2
    stay, those of the first row and of the second row's beginning."""
    out, _, _ = fused("sce", floats(0, 0, 0, 0), [2, -2, 2, 2], [0, 0, 0, 0], select_topk=0.5)
    assert out.tolist() == [2, -2, 0, 0]
    base = np.zeros((2, 2), np.float32)
    out, _, _ = merged("sce", base, [base + np.float32([[0, 1], [1, 1]]), base], values={"select_topk": 0.67})
    assert out.tolist() == [0, 1, 1, 0]


def test_sce_zeroes_nothing_where_everything_is_selected() -> None:
    """The second position has no variance, and stays all the same: η = 10/28 and 18/28."""
    for select_topk in (1.0, 1.5):
        out, measured, counts = fused("sce", floats(0, 0), [1, 3], [3, 3], select_topk=select_topk)
        assert measured.coefficients == pytest.approx([10 / 28, 18 / 28], rel=1e-12), select_topk
        assert out == pytest.approx([(10 * 1 + 18 * 3) / 28, 3])
        assert counts == (4, 4, 4)


def test_sce_takes_one_target_whole() -> None:
    for select_topk in (0.0, 0.01, 0.1, 1.0):
        out, measured, counts = fused("sce", floats(1, 2, 3), [0.5, 0, -4], select_topk=select_topk)
        assert out.tolist() == [1.5, 2, -1], select_topk
        assert measured.coefficients.tolist() == [1]
        assert counts == (3, 2, 2)


def test_a_tensor_that_did_not_change_stays_and_the_coefficients_are_equal() -> None:
    base = floats(0.1, -0.2, 0.3)
    for targets, (method, values) in itertools.product(
        (1, 2, 3), (("varm", {}), ("sce", {}), ("sce", {"select_topk": 0.1}))
    ):
        out, measured, _ = merged(method, base, [base.copy()] * targets, values=values)
        assert out.tolist() == base.tolist(), (method, targets)
        assert measured.coefficients == pytest.approx([1 / targets] * targets)


def test_coefficients_of_a_light_fine_tuning_are_not_equal() -> None:
    """No absolute threshold: updates of any size have the same coefficients, 4/5 and 1/5."""
    for scale, (method, shares) in itertools.product(
        (1e-3, 1e-8, 1e-15, 1e-30), (("sce", (1, 1)), ("varm", (0.8, 0.2)))
    ):
        out, measured, _ = fused(method, floats(0, 0), [2 * scale, 0], [0, scale])
        assert measured.coefficients == pytest.approx([0.8, 0.2], rel=1e-6), (method, scale)
        assert out == pytest.approx([2 * scale * shares[0], scale * shares[1]], rel=1e-6, abs=0)


def test_targets_that_agree_everywhere_have_no_variance_to_select_by() -> None:
    for targets in (2, 3, 5, 6, 7):
        base, delta = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
        out, _, counts = merged("sce", base, [base + delta] * targets, values={"select_topk": 0.5})
        assert out.tolist() == base.tolist(), targets
        assert counts == (0, 0, 0)


def test_varm_by_hand() -> None:
    """Squared updates 9 and 1: weights 0.9 and 0.1. 0.9 · 13 + 0.1 · 10 = 12.7, and 0.9 · 20 + 0.1 · 21 = 20.1."""
    out, measured, _ = merged("varm", [10, 20], [[13, 20], [10, 21]])
    assert measured.coefficients == pytest.approx([0.9, 0.1])
    assert measured.squares.tolist() == [9, 1]
    assert out == pytest.approx([12.7, 20.1], rel=1e-6)


def test_linear_by_hand() -> None:
    """1·1 + 2·2 + 1·6 = 11 and 1·2 + 2·4 + 1·0 = 10; normalised, over 4. Weights may add up to zero where nobody divides by it."""
    models, weight = [[1, 2], [2, 4], [6, 0]], [1.0, 2.0, 1.0]
    assert merged("linear", None, models, values={"weight": weight})[0].tolist() == [11 / 4, 10 / 4]
    assert merged("linear", None, models, values={"weight": weight, "normalize": False})[0].tolist() == [11, 10]
    models, weight = [[3, 4], [1, 1]], [1.0, -1.0]
    assert merged("linear", None, models, values={"weight": weight, "normalize": False})[0].tolist() == [2, 3]
    with pytest.raises(RecipeError, match=r"^weight: the weights of tensor add up to zero, and normalize divides by"):
        merged("linear", None, models, values={"weight": weight})


def test_task_arithmetic_by_hand() -> None:
    """0.5 · (2, -2, 0) - 1 · (1, 3, 4) = (0, -4, -4); doubled (0, -8, -8); over the weights' sum, -0.5, (0, 16, 16).

    Nothing is divided by weights that add up to zero.
    """
    deltas, values = ([2, -2, 0], [1, 3, 4]), {"weight": [0.5, -1.0], "lambda": 2.0}
    out, measured, counts = fused("task_arithmetic", floats(10, 10, 10), *deltas, **values)
    assert out.tolist() == [10, 2, 2]
    assert measured.coefficients.tolist() == [0.5, -1]
    assert counts == (6, 5, 5)
    assert fused("task_arithmetic", floats(10, 10, 10), *deltas, normalize=True, **values)[0].tolist() == [10, 26, 26]
    out, _, _ = fused("task_arithmetic", floats(10, 10), [2, -2], [1, 3], weight=[1.0, -1.0], normalize=True)
    assert out.tolist() == [11, 5]


TRIMMED = ([4, -1, 0.5, -3], [-2, 5, 1, -1], [1, 1, 1, 1])


@each("values, expected", [
    ({}, [12, 10 + 7 / 3, 10, 7]),
    ({"normalize": False}, [16, 17, 10, 7]),
    ({"lambda": 0.5}, [11, 10 + 7 / 6, 10, 8.5]),
    ({"rescale": True}, [10 + 62 / 21, 10 + 73 / 21, 10, 10 - 51 / 14]),
    ({"rescale": True, "normalize": False, "lambda": -1.0}, [10 - 62 / 7, 10 - 73 / 7, 10, 10 + 51 / 14]),
])  # fmt: skip
def test_ties_by_hand_with_every_step(values: dict[str, Any], expected: list[float]) -> None:
    """Half of each is kept: (4, 0, 0, -3), (-2, 5, 0, 0), and of equals the first, (1, 1, 0, 0). Weights 1, 1, 2.

    At 0: 4 - 2 + 2 > 0; 4 and 2 agree: 6 over the weights 1 + 2. At 1: 5 + 2 over 1 + 2. At 3: -3 over 1.
    Rescaled by 8.5/7, 9/7 and 4/2: at 0 34/7 - 18/7 + 4 > 0, 34/7 + 4 = 62/7; at 1 45/7 + 4 = 73/7; at 3 -25.5/7.
    """
    out, _, counts = fused("ties", TEN[:4], *TRIMMED, weight=[1.0, 1.0, 2.0], density=0.5, **values)
    assert out == pytest.approx(expected, rel=1e-6)
    assert counts == (6, 6, 5)


def test_ties_keeps_the_share_that_density_tells() -> None:
    """Added up without division. Of 0.01 one is kept all the same: 4, 5, and the first 1.

    Of 0.75, (4, -1, 0, -3), (-2, 5, 1, 0), where 1 at 2 comes before its -1 at 3, and (1, 1, 1, 0). With a density for each target:
    all of the first, (0, 8) of the second, nothing of the third: 2, and 1 + 8 over 2.
    """
    expected = {0.0: [10, 10, 10, 10], 0.01: [15, 15, 10, 10], 0.5: [15, 16, 10, 7]}
    for density, values in (expected | {0.75: [15, 16, 12, 7], 1.0: [15, 16, 12.5, 6]}).items():
        out, _, _ = fused("ties", TEN[:4], *TRIMMED, weight=1.0, density=density, normalize=False)
        assert out.tolist() == values, density
    out, _, counts = fused("ties", floats(0, 0), [2, 1], [4, 8], [7, 7], weight=1.0, density=[1.0, 0.5, 0.0])
    assert out.tolist() == [2, 4.5]
    assert counts == (3, 3, 3)


def test_ties_weighs_before_it_elects_and_divides_by_what_agrees() -> None:
    """At 0 2 - 3 < 0: -3 over its weight, -1, is 3, as in mergekit. At 1 1 - 1 = 0 elects the positive.

    At 2 both are positive, 1 + 1, and their weights add up to 0, which nothing is divided by.
    """
    out, _, counts = fused("ties", floats(10, 10, 10), [2, 1, 1], [3, 1, -1], weight=[1.0, -1.0])
    assert out.tolist() == [13, 11, 12]
    assert counts == (6, 6, 4)


@each("method, values, expected", [
    ("dare_linear", {"rescale": False}, [1, 0, -0.5, 4, 0, 0]),
    ("dare_linear", {}, [21 / 11, 0, -10 / 13, 84 / 11, 0, 318 / 143]),
    ("dare_linear", {"normalize": True, "lambda": 3.0}, [42 / 11, 0, -20 / 13, 168 / 11, 0, 636 / 143]),
    ("dare_ties", {"rescale": False}, [1, 0, -0.5, 4, 0, 6]),
    ("dare_ties", {}, [21 / 11, 0, -10 / 13, 84 / 11, 0, 126 / 11]),
    ("dare_ties", {"normalize": True, "lambda": 3.0}, [63 / 11, 0, -60 / 13, 252 / 11, 0, 378 / 11]),
])  # fmt: skip
def test_dare_by_hand(method: str, values: dict[str, Any], expected: list[float]) -> None:
    """Seed 0 keeps (1, 0, 0, 4, 0, 6) and (0, 0, -1, 0, 0, -12) of this tensor, in every version. Weights 1 and 1/2.

    At the last 6 - 6 = 0, or rescaled by 21/11 and 20/13, 126/11 - 120/13 = 318/143 > 0: the positive is elected.
    """
    deltas = ([1, 2, 3, 4, 5, 6], [-2, 1, -1, 1, 3, -12])
    out, _, counts = fused(method, np.zeros(6, np.float32), *deltas, weight=[1.0, 0.5], density=0.5, **values)
    assert out == pytest.approx(expected, rel=1e-6)
    assert counts == (5, 5, 5 if method == "dare_linear" else 4)


def test_dare_draws_by_seed_and_tensor() -> None:
    base, delta = np.zeros(64, np.float32), np.ones(64, np.float32)

    def drawn(method: str, name: str, seed: int) -> list[float]:
        values = {"weight": 1.0, "density": 0.5, "rescale": False, "seed": seed}
        return merged(method, base, [delta], values=values, name=name)[0].tolist()

    for method in ("dare_linear", "dare_ties"):
        assert drawn(method, "a", 0) == drawn(method, "a", 0)
        assert len({tuple(drawn(method, name, seed)) for name in ("a", "b") for seed in (0, 1)}) == 4, method


def test_slerp_by_hand() -> None:
    """Vectors of lengths 2 and 1 with 60° between: for t = 1/3, sin 40° / sin 60° and sin 20° / sin 60° of them."""
    for t in (0.0, 0.25, 1 / 3, 0.5, 1.0):
        out, measured, _ = merged("slerp", [2, 0], [[0.5, math.sqrt(0.75)]], values={"t": t})
        own, other = (math.sin(math.radians(60 * part)) / math.sin(math.radians(60)) for part in (1 - t, t))
        assert out == pytest.approx([2 * own + 0.5 * other, math.sqrt(0.75) * other], abs=1e-6), t
        assert measured.coefficients == pytest.approx([other], abs=1e-7)


ONE = {"weight": None, "density": 1.0, "lambda": 1.0}


@each("method, parameters", [
    ("linear", {"weight": None, "normalize": True}),
    ("slerp", {"t": None}),
    ("task_arithmetic", {"weight": None, "normalize": False, "lambda": 1.0}),
    ("ties", {**ONE, "normalize": True, "rescale": False}),
    ("dare_linear", {**ONE, "normalize": False, "rescale": True, "seed": 0}),
    ("dare_ties", {**ONE, "normalize": False, "rescale": True, "seed": 0}),
    ("sce", {"select_topk": 1.0, "select_deltas": True, "normalize": True}),
    ("varm", {}),
])  # fmt: skip
def test_parameters_have_the_names_and_defaults_of_mergekit(method: str, parameters: dict[str, Any]) -> None:
    """But for `seed`, `select_deltas` and SCE's `normalize`, which it does not have."""
    module = load_method(method)
    assert {parameter.name: parameter.default for parameter in module.PARAMETERS} == parameters
    assert {p.name for p in module.PARAMETERS if p.per_model} == parameters.keys() & {"weight", "density"}
    assert (method != "linear") == module.BASE


def every(method: str) -> dict[str, Any]:
    """Values that take every step of a method."""
    if method == "sce":
        return {"select_topk": 0.3}
    wanted = {"weight": 0.7, "density": 0.4, "rescale": True, "t": 0.3}
    return {p.name: wanted[p.name] for p in load_method(method).PARAMETERS if p.name in wanted}


@each("method", method_names())
def test_an_empty_tensor_and_inputs_left_as_they_were(method: str) -> None:
    """Though a method may overwrite the blocks that it is given."""
    module, empty = load_method(method), np.zeros(0, np.float32)
    targets = [empty] * (module.TARGETS or 2)
    out, measured, counts = merged(method, empty if module.BASE else None, targets, values=every(method))
    assert out.shape == (0,)
    assert counts == (0, 0, 0)
    assert np.isfinite(measured.coefficients).all()
    arrays = list(np.random.default_rng(0).normal(size=(3, CHUNK + 5)).astype(np.float32))[: 1 + (module.TARGETS or 2)]
    before = [array.copy() for array in arrays]
    base, targets = (arrays[0], arrays[1:]) if module.BASE else (None, arrays)
    out, _, _ = merged(method, base, targets, values=every(method), block=CHUNK)
    assert np.isfinite(out).all()
    assert [array.tobytes() for array in arrays] == [array.tobytes() for array in before]
