"""The benchmark of merging, on models of a few MB: FuseChat stores what the benchmark's own float64 reference rounds to."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cases import each

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "merge.py"
CASES = ["sce-0.1", "sce-1.0", "varm", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a run prints, and the figures of every case, over all tensors."""
    room = tmp_path_factory.mktemp("merge")
    figures = room / "figures.json"
    small = ("--scale", "small", "--without-mergekit", "--models", str(room / "models"))
    done = benchmark(*small, "--repeat", "1", "--sample", "100", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    return done.stdout, {result["case"]: result for result in json.loads(figures.read_text())["results"]}


def test_every_method_is_measured(measured: tuple[str, dict[str, Any]]) -> None:
    printed, results = measured
    assert list(results) == CASES
    for name in CASES:
        assert printed.count(f"| {name} |") == 2, printed  # a row in each table
        assert set(results[name]["runs"]) == {"FuseChat"}
        assert 0 < results[name]["inside"] < results[name]["runs"]["FuseChat"]["seconds"]
        assert results[name]["runs"]["FuseChat"]["memory"] > 1 << 20


@each("case", CASES)
def test_what_is_stored_is_the_reference_rounded(measured: tuple[str, dict[str, Any]], case: str) -> None:
    """Selection and signs are the reference's at every position, or elements would be unexplained.

    About 2**-16 of all elements lie so close to the middle between two bfloat16 that one rounding of a float32 on the way leads to
    the other one; there are several roundings.
    """
    found = measured[1][case]["differences"]["FuseChat"]
    assert found["elements"] == 625_280
    assert found["unexplained"] == 0
    assert found["not_nearest"] <= 2e-4 * found["elements"]
    assert found["beyond"] <= 2**-20  # of numbers of about one
    assert found["largest"] <= 2**-8 + 2**-20  # half the distance between bfloat16 numbers of one to two


def test_a_method_that_is_unknown_is_named() -> None:
    done = benchmark("--methods", "sce,nonesuch")
    assert done.returncode == 1
    assert "--methods: nonesuch; known are all, dare_linear" in done.stderr
    assert "Traceback" not in done.stderr
