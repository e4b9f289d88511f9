"""AlpacaEval from answers to rates, with a judge that follows a script."""

import json
import logging
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alpaca_evaluating import (
    JUDGE,
    Judge,
    answering,
    baseline_records,
    by_table,
    made_up,
    needs_the_library,
    odds,
    official,
    preferring,
    shown,
    subject,
    write,
)
from fusechat.errors import DataError
from fusechat.evaluate.alpaca.data import AlpacaData, load
from fusechat.evaluate.alpaca.suite import run, score_annotations
from fusechat.evaluate.records import Measurement
from fusechat.evaluate.statistics import ratio
from fusechat.models.answers import Missing
from fusechat.models.client import Reply, Request
from fusechat.run.progress import log

needs_the_library()


@pytest.fixture
def data(tmp_path: Path) -> AlpacaData:
    return load(write(tmp_path / "outputs.json", baseline_records()))


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the user reads while it continues."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Lines()
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


def evaluate(
    data: AlpacaData, judge: Judge, directory: Path, answers: dict[str, Any], **options: Any
) -> tuple[dict[str, list[Measurement]], dict[str, Any]]:
    said: list[Any] = []

    def announce(estimate: Any) -> None:
        assert not judge.asked
        said.append(estimate)

    directory.mkdir(exist_ok=True)
    options = {"announce": announce} | options
    found = run(
        [subject(label) for label in answers],
        data=data,
        answering=answering(answers),
        judge=judge,  # type: ignore[arg-type]
        directory=directory,
        **options,
    )
    assert len(said) == 1
    return found


def longer(first: str, second: str) -> float:
    """The judge is the surer that an answer is better the more it says."""
    return len(second) / (len(first) + len(second))


def test_rates_of_two_models(data: AlpacaData, tmp_path: Path) -> None:
    judge = Judge(lambda request: preferring(request, longer))
    short, long = ["No."] * 12, ["It is a number."] * 12
    measured, settings = evaluate(data, judge, tmp_path / "out", {"short": short, "a/long": long})
    for label, answers in (("short", short), ("a/long", long)):
        plain, controlled = measured[label]
        shares = [100 * longer(base, ours) for base, ours in zip(data.baseline, answers, strict=True)]
        assert [plain.items[str(number)][0] for number in range(12)] == pytest.approx(shares)
        assert plain.value == pytest.approx(sum(shares) / 12)
        assert plain.missing == controlled.missing == 0
        assert controlled.estimate.value is None
        assert controlled.why
        assert controlled.why.startswith("needs AlpacaEval's 805 instructions")
    assert len(judge.asked) == 24
    assert settings == {
        "annotator": "weighted_alpaca_eval_gpt4_turbo",
        "judge": JUDGE,
        "baseline": "base",
        "data": data.digest,
        "difficulties": None,
        "limit": None,
        "max_new_tokens": 2048,
        "temperature": 0.0,
    }
    json.dumps(settings)


def test_annotations_are_kept_in_the_published_format(data: AlpacaData, tmp_path: Path) -> None:
    judge = Judge(lambda request: preferring(request, longer))
    answers = ["Yes.", None, *["No, it is not."] * 10]
    measured, _ = evaluate(data, judge, tmp_path / "out", {"a/b": answers})
    file = tmp_path / "out" / "a_b.annotations.json"
    records = json.loads(file.read_text())
    assert [one["instruction"] for one in records] == list(data.instructions)
    assert records[0] | {"preference": None} == {
        "annotator": "weighted_alpaca_eval_gpt4_turbo",
        "dataset": "sums",
        "generator_1": "base",
        "generator_2": "a/b",
        "instruction": "What is 0 + 1?",
        "output_1": "It is 1.",
        "output_2": "Yes.",
        "preference": None,
    }
    assert records[1]["output_2"] is records[1]["preference"] is None
    assert records[1]["missing"] == "no answer: the server is gone"
    again, _ = score_annotations(file, gamed=None)
    assert again == measured


def test_what_is_missing_is_counted_and_not_asked(data: AlpacaData, tmp_path: Path, told: list[str]) -> None:
    def script(request: Request) -> Reply | Missing:
        if "What is 3 + 1?" in request.messages[-1][1]:
            return Missing("timed out")
        return preferring(request, lambda first, second: float(second.startswith("ours")))

    judge = Judge(script)
    measured, _ = evaluate(data, judge, tmp_path / "out", {"m": [None, "It is 2.", *["ours"] * 10]})
    plain = measured["m"][0]
    assert plain.missing == 2
    assert set(plain.items) == {str(number) for number in range(12)} - {"0", "3"}
    assert plain.items["1"] == (50.0, 1.0)  # the baseline's own words: a draw, and nothing to ask
    assert all(plain.items[str(number)] == (pytest.approx(100.0), 1.0) for number in (2, 4, 11))
    assert len(judge.asked) == 10
    # why there is no answer was said when answers were asked for
    assert told == ["m: judgements missing: 1 (timed out)"]


def test_a_judge_without_log_probabilities_is_found_out_soon(data: AlpacaData, tmp_path: Path, told: list[str]) -> None:
    judge = Judge(lambda request: Reply("m", "length", 9, 1, None))
    measured, _ = evaluate(data, judge, tmp_path / "out", {"a": ["x"] * 12, "b": ["y"] * 12})
    assert len(judge.asked) == 8
    assert len(told) == 1
    assert told[0].startswith("http://judge.test/v1: the judge gives no log-probabilities")
    for one in [*measured["a"][:1], *measured["b"][:1]]:
        assert one.estimate.value is None
        assert one.missing == 12
        assert one.why == "no judgements: the judge gives no log-probabilities"


def test_first_requests_that_fail_do_not_stop_the_others(data: AlpacaData, tmp_path: Path) -> None:
    asked: list[Request] = []

    def script(request: Request) -> Reply | Missing:
        asked.append(request)
        return Missing("no") if len(asked) <= 8 else preferring(request, longer)

    measured, _ = evaluate(data, Judge(script), tmp_path / "out", {"a": ["x"] * 12})
    assert len(asked) == 12
    assert measured["a"][0].missing == 8


def test_single_replies_without_log_probabilities_are_counted(
    data: AlpacaData, tmp_path: Path, told: list[str]
) -> None:
    def script(request: Request) -> Reply | Missing:
        bare = "What is 3 + 1?" in request.messages[-1][1]
        return Reply("m", "length", 9, 1, None) if bare else preferring(request, longer)

    measured, _ = evaluate(data, Judge(script), tmp_path / "out", {"a": ["x"] * 12})
    assert measured["a"][0].missing == 1
    assert told == ["a: judgements missing: 1 (the judge's reply has no log-probabilities)"]


def test_a_limit(data: AlpacaData, tmp_path: Path) -> None:
    judge = Judge(lambda request: preferring(request, longer))
    measured, settings = evaluate(data, judge, tmp_path / "out", {"a": ["x"] * 12}, limit=3, max_new_tokens=7)
    assert len(judge.asked) == 3
    assert measured["a"][1].why
    assert measured["a"][1].why.startswith("needs AlpacaEval's 805 instructions")
    assert (settings["limit"], settings["max_new_tokens"]) == (3, 7)
    assert settings["data"] == data.first(3).digest


def test_nobody_is_asked_before_the_announcement(data: AlpacaData, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(estimate: Any) -> None:
        assert estimate.calls == 12
        assert estimate.completion_tokens == 12
        raise Stop

    judge = Judge(lambda request: Missing("no"))
    with pytest.raises(Stop):
        evaluate(data, judge, tmp_path / "out", {"a": ["x"] * 12}, announce=stop)
    assert not judge.asked


def test_difficulties_are_looked_for_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*names: str, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    judge = Judge(lambda request: Missing("no"))
    fetched = pytest.raises(DataError, match=r"df_gamed\.csv: not fetched .*; give --data a directory that holds")
    with official(tmp_path), fetched:
        (tmp_path / "df_gamed.csv").unlink()
        whole = load(tmp_path / "model.annotations.json")
        evaluate(whole, judge, tmp_path / "out", {"a": ["x"] * 805})
    assert not judge.asked


def test_judgements_through_the_whole_suite(tmp_path: Path) -> None:
    """A judge whose taste for length is known gives the rate at equal length, whichever output it is shown first. Of a second model
    some answers and some judgements are missing."""
    records = made_up()
    table = {(one["output_1"], one["output_2"]): one["preference"] for one in records}
    script = by_table(table)
    answers = [one["output_2"] for one in records]
    some = [None if number % 100 == 7 else text for number, text in enumerate(answers)]
    silent = {answers[number] for number in range(3, 805, 200)}
    marked = {f"{text} " for text in silent}  # the second model's, so that the first one's are judged

    def judge_all(request: Request) -> Reply | Missing:
        return Missing("timed out") if marked & set(shown(request)) else script(request)

    some = [f"{text} " if text in silent else text for text in some]
    (tmp_path / "data").mkdir()
    with official(tmp_path / "data") as place:
        whole, judge = load(place), Judge(judge_all)
        measured, settings = evaluate(whole, judge, tmp_path / "out", {"all": answers, "some": some})
        plain, controlled = measured["all"]
        assert plain.value == pytest.approx(100 * statistics.fmean(one["preference"] - 1 for one in records), abs=1e-4)
        assert controlled.value == pytest.approx(100 * odds(0.0).mean(), abs=0.5)
        assert plain.missing == controlled.missing == 0
        assert settings["difficulties"]
        fewer, fitted = measured["some"]
        assert fewer.missing == fitted.missing == 8 + 5
        assert len(fewer.items) == fitted.n == 805 - 13
        assert fitted.value == pytest.approx(100 * odds(0.0).mean(), abs=1.0)
        for label in ("all", "some"):
            file = tmp_path / "out" / f"{label}.annotations.json"
            again, _ = score_annotations(file, gamed=place / "df_gamed.csv")
            assert again == {label: measured[label]}
            assert ratio(again[label][0].items).value == pytest.approx(measured[label][0].value)
