"""Win rates, against published numbers and the library's own; and what the library is kept from doing."""

import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alpaca_evaluating import OFFICIAL, PUBLISHED, annotation_records, made_up, needs_the_library, odds, official, write
from fusechat.errors import RecipeError
from fusechat.evaluate.alpaca import data
from fusechat.evaluate.alpaca.data import Annotation, read_annotations
from fusechat.evaluate.alpaca.library import library
from fusechat.evaluate.alpaca.rates import fit, length_controlled, win_rate
from fusechat.evaluate.alpaca.suite import score_annotations
from fusechat.evaluate.records import Measurement
from fusechat.evaluate.statistics import ratio

needs_the_library()
EQUAL = 100 * float(odds(0.0).mean())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with official(tmp_path_factory.mktemp("official")) as directory:
        yield directory


@pytest.fixture(scope="module")
def gamed(place: Path) -> Path:
    return place / "df_gamed.csv"


@pytest.fixture(scope="module")
def annotations(place: Path) -> list[Annotation]:
    return read_annotations(place / "model.annotations.json")["model"]


def check_rates(file: Path, model: str) -> tuple[Measurement, Measurement]:
    measured, settings = score_annotations(file, gamed=None)
    assert list(measured) == [model]
    plain, controlled = measured[model]
    assert (plain.data, plain.metric, plain.missing) == ("all", "win_rate", 0)
    assert (controlled.data, controlled.metric, controlled.missing) == ("all", "length_controlled_win_rate", 0)
    assert len(plain.items) == 805
    found = ratio(plain.items)
    assert found.value == pytest.approx(plain.value, abs=1e-9)
    assert found.standard_error == pytest.approx(plain.standard_error, abs=1e-9)
    assert (controlled.n, controlled.items) == (805, {}), "what a fit predicts is not measured"
    assert settings["annotator"] == "weighted_alpaca_eval_gpt4_turbo"
    assert settings["baseline"] == "gpt4_1106_preview"
    assert not any("/" in str(value) for value in settings.values())
    return plain, controlled


def test_rates_of_a_judge_whose_taste_for_length_is_known(place: Path) -> None:
    plain, controlled = check_rates(place / "model.annotations.json", "model")
    assert plain.value == pytest.approx(100 * statistics.fmean(one["preference"] - 1 for one in made_up()))
    assert controlled.value == pytest.approx(EQUAL, abs=0.5)
    assert abs(plain.value - EQUAL) > 1, "length matters"


def test_published_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    if not PUBLISHED.exists():
        pytest.skip(
            "AlpacaEval's published annotations, which are not free to be copied, are not next to this checkout"
        )
    monkeypatch.setattr(data, "_OFFICIAL", OFFICIAL)
    plain, controlled = check_rates(PUBLISHED, "FuseChat-Llama-3.2-1B-Instruct")
    assert plain.value == pytest.approx(29.9219, abs=5e-5)
    assert controlled.value == pytest.approx(25.27098, abs=5e-6)
    assert plain.standard_error == pytest.approx(1.39346, abs=5e-6)
    assert controlled.standard_error == pytest.approx(0.64066, abs=5e-6)


def without(annotations: list[Annotation], numbers: set[int], **values: Any) -> list[Annotation]:
    return [replace(one, **values) if number in numbers else one for number, one in enumerate(annotations)]


PREFERENCES = [1.0, 2.0, 1.5, 0.0, 1.25, 1.999, None]


def of(preferences: list[float | None], **values: Any) -> list[Annotation]:
    return [
        Annotation(f"Q{n}", "theirs", f"ours {n}", "base", "model", "judge", value, **values)
        for n, value in enumerate(preferences)
    ]


def test_a_win_rate_is_the_librarys() -> None:
    found = win_rate(of(PREFERENCES))
    with library() as using:
        theirs = using.glm.get_winrate([{"preference": value} for value in PREFERENCES if value is not None])
    assert found.missing == 1
    assert found.value == found.estimate.value == theirs["win_rate"]
    assert found.standard_error == theirs["standard_error"]


def test_a_win_rate_is_a_mean() -> None:
    found = win_rate(of(PREFERENCES))
    values = [0.0, 100.0, 50.0, 50.0, 25.0, 99.9]  # 0 is a draw
    assert [found.items[str(number)] for number in range(6)] == [(pytest.approx(value), 1.0) for value in values]
    for estimate in (found.estimate, ratio(found.items)):
        assert estimate.value == pytest.approx(statistics.fmean(values))
        assert estimate.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(6))
        assert estimate.n == 6


def test_one_judgement_has_no_standard_error() -> None:
    found = win_rate(of([1.2, None]))
    assert found.value == pytest.approx(20)
    assert found.standard_error is None
    assert (len(found.items), found.missing) == (1, 1)


def test_without_judgements_there_is_no_rate(annotations: list[Annotation], gamed: Path) -> None:
    for found in (win_rate(of([None, None], missing="silence")), length_controlled(of([None, None]), gamed)):
        assert found.estimate.value is None
        assert (dict(found.items), found.missing) == ({}, 2)
    assert win_rate(of([None, None], missing="silence")).why == "no judgements: silence"
    assert win_rate(of([None])).why == "no judgements"
    found = length_controlled(without(annotations, set(range(4, 805)), preference=None), gamed)
    assert (found.value, found.missing) == (None, 801)
    assert found.why == "4 judgements are too few for a fit"


def line(annotations: list[Annotation], found: Measurement, gamed: Path) -> list[int]:
    """At equal length the predicted log-odds are a line in the difficulty; that they are shows that each instruction was given
    its own. The places that have one."""
    predicted, _ = fit(annotations, gamed)
    rows, share = list(predicted), np.array(list(predicted.values()))
    assert found.value == pytest.approx(100 * share.mean())
    hard, odds = (
        [float(row.split(",")[3]) for row in gamed.read_text().splitlines()[1:806]],
        np.log(share / (1 - share)),
    )
    slope, intercept = np.polyfit(np.array(hard)[rows], odds, 1)
    np.testing.assert_allclose(odds, slope * np.array(hard)[rows] + intercept, atol=1e-9)
    assert slope != 0
    return rows


def test_missing_judgements_are_left_out_of_the_fit_and_predicted(annotations: list[Annotation], gamed: Path) -> None:
    lost = set(range(0, 805, 40))
    left = without(annotations, lost, preference=None)
    found = length_controlled(left, gamed)
    assert (found.n, found.missing) == (805 - len(lost), len(lost))
    assert found.value == pytest.approx(EQUAL, abs=1.0)
    assert line(left, found, gamed) == list(range(805))


def test_missing_answers_leave_the_others_at_their_places(annotations: list[Annotation], gamed: Path) -> None:
    """The first answers are missing, so that all others would slip to other instructions' difficulties."""
    left = without(annotations, set(range(30)), preference=None, output_2=None)
    found = length_controlled(left, gamed)
    assert line(left, found, gamed) == list(range(30, 805))
    assert found.missing == 30
    assert found.value == pytest.approx(EQUAL, abs=2.0)


def test_a_model_that_always_loses_has_a_rate(annotations: list[Annotation], gamed: Path) -> None:
    found = length_controlled([replace(one, preference=1.0) for one in annotations], gamed)
    assert found.value is not None
    assert 0 <= found.value < 5


def test_answers_of_one_length_cannot_be_fitted(annotations: list[Annotation], gamed: Path) -> None:
    found = length_controlled([replace(one, output_1="a", output_2="b") for one in annotations], gamed)
    assert (found.value, found.missing) == (None, 0)
    assert found.why
    assert found.why.startswith("the fit ")


def test_other_instructions_have_a_win_rate_only(tmp_path: Path) -> None:
    both = [*annotation_records(4, "a"), *annotation_records(4, "b/c")]
    measured, _ = score_annotations(write(tmp_path / "x.json", both), gamed=None)
    assert list(measured) == ["a", "b/c"]
    for plain, controlled in measured.values():
        assert plain.value == pytest.approx(100 * (0 + 1 + 2 + 3) / 16)
        assert controlled.estimate.value is None
        assert controlled.why == "needs AlpacaEval's 805 instructions, all of them and in their order"


def test_the_library_leaves_no_trace(tmp_path: Path, place: Path) -> None:
    """In a process of its own: `.env` is not read, nothing is printed or written, the settings of others are as before."""
    (tmp_path / "home").mkdir()
    (tmp_path / ".env").write_text("FUSECHAT_TRACE=1\n")
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    program = f"""
import logging, os, socket, sys
from pathlib import Path
import alpaca_eval_place, sklearn
from fusechat.evaluate.alpaca import data
data._OFFICIAL = {data._OFFICIAL!r}
place = alpaca_eval_place.place
def state():
    files = sorted((str(file), file.stat().st_mtime_ns) for file in place.rglob("*") if "__pycache__" not in str(file))
    root = logging.getLogger()
    return root.level, root.handlers[:], sklearn.get_config(), files, "pkg_resources" in sys.modules
before = state()
def refuse(*_): raise AssertionError("network")
socket.socket.connect = refuse
from fusechat.evaluate.alpaca.suite import score_annotations
measured, _ = score_annotations(Path("model.annotations.json"), gamed=Path("df_gamed.csv"))
assert abs(measured["model"][1].value - {EQUAL}) < 0.5
assert state() == before
import dotenv
assert "FUSECHAT_TRACE" not in os.environ and dotenv.load_dotenv.__module__ == "dotenv.main"
"""
    with library() as using:
        own = Path(using.utils.__file__).parent
    (tmp_path / "alpaca_eval_place.py").write_text(f"from pathlib import Path\nplace = Path({str(own)!r})\n")
    environment = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {".env", "model.annotations.json", "df_gamed.csv", "alpaca_eval_place.py"}


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'fusechat\[alpaca-eval\]'"):
        win_rate(of([1.5]))
