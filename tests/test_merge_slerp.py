"""SLERP against the textbook's formula, at known angles and at those of any vectors."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import each
from fusechat.merge.kernels import CHUNK
from merging import floats, merged


def arc(base: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    """The textbook's formula, of the angle between the two."""
    own, its = (values.astype(np.float64) for values in (base, other))
    angle = math.acos(math.fsum(own * its) / math.sqrt(math.fsum(own**2) * math.fsum(its**2)))
    return (math.sin((1 - t) * angle) * own + math.sin(t * angle) * its) / math.sin(angle)


def slerp(base: np.ndarray, other: np.ndarray, t: float, **how: int) -> np.ndarray:
    return merged("slerp", base, [other], values={"t": t}, **how)[0]


@given(degrees=st.floats(2, 178), lengths=st.tuples(*[st.floats(1e-3, 1e3)] * 2), t=st.floats(0, 1))
def test_slerp_at_a_known_angle(degrees: float, lengths: tuple[float, float], t: float) -> None:
    angle = math.radians(degrees)
    base = floats(0, lengths[0], 0)
    other = floats(0, lengths[1] * math.cos(angle), lengths[1] * math.sin(angle))
    own, its = (math.sin(part * angle) / math.sin(angle) for part in (1 - t, t))
    # stored in float32, the angle itself is off by a little, which counts where it is nearly 180°
    assert slerp(base, other, t) == pytest.approx(
        own * base + its * other, rel=1e-4, abs=1e-5 * (own + its) * max(lengths)
    )


def test_slerp_of_any_vectors() -> None:
    for size, t in itertools.product((2, 511, CHUNK + 1, 3 * CHUNK + 600), (0.0, 0.2, 0.5, 0.9, 1.0)):
        base, noise = np.random.default_rng(size).normal(size=(2, size)).astype(np.float32)
        for other in (noise, base + noise / 2, noise - base):
            found = slerp(base, other, t, block=CHUNK)
            assert found == pytest.approx(arc(base, other, t), rel=1e-5, abs=1e-5), (size, t)


@each("degrees, straight", [(1.5, True), (1.9, False), (178.1, False), (178.5, True), (180, True)])
def test_slerp_is_straight_where_vectors_are_nearly_parallel_or_opposite(degrees: float, straight: bool) -> None:
    """A cosine of 0.9995 is 1.81°."""
    angle = math.radians(degrees)
    base, other = floats(3, 0), floats(2 * math.cos(angle), 2 * math.sin(angle))
    line, bow = 0.7 * base + 0.3 * other, arc(base, other, 0.3) if degrees < 180 else None
    assert slerp(base, other, 0.3) == pytest.approx(line if straight else bow, rel=1e-6, abs=1e-7)
    assert bow is None or np.abs(line - bow).max() > 1e-4, "they can be told apart"


def test_slerp_of_a_zero_vector_turns_by_a_right_angle() -> None:
    """As in mergekit: its product with anything is zero, and so is the cosine."""
    zero, other = floats(0, 0), floats(3, 4)
    half = math.sqrt(0.5)
    assert slerp(zero, other, 0.5) == pytest.approx(half * other, rel=1e-6)
    assert slerp(other, zero, 0.5) == pytest.approx(half * other, rel=1e-6)
    assert slerp(zero, zero, 0.5).tolist() == [0, 0]


def test_slerp_begins_and_ends_with_the_two() -> None:
    base, other = np.random.default_rng(1).normal(size=(2, 100)).astype(np.float32)
    assert slerp(base, other, 0.0).tolist() == base.tolist()
    assert slerp(base, other, 1.0).tolist() == other.tolist()
    assert slerp(base, -base, 0.5).tolist() == [0] * 100
