"""MT-Bench and AlpacaEval from the command line with a real judge: what the tables say is computed again from the files that a user
gets; nothing is asked twice; faults and kills lose nothing; the key is told to nobody."""

import json
import math
import re
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import alpaca_evaluating
import judged
import mt_benching
from forks import Command
from fusechat.commands.cli import app
from fusechat.errors import ModelError, RecipeError
from judged import JUDGEMENTS, KEY, LIMITS, RUNS, Place, Scored, lines, mean, records, refused, shows, tells_no_key
from judging import journal_keys
from reporting import students_t
from runs import here

alpaca_evaluating.needs_the_library()
BOTH = ("one", "two")
FAULTS = ("cut", "half", "429", "500", None, "nonsense", "drip", "no score", "shape", "503", "400")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Iterator[Place]:
    with judged.place(tmp_path_factory.mktemp("judged"), models) as found:
        yield found


@pytest.fixture(scope="module")
def scored(place: Place) -> Scored:
    return judged.scored(place, "mt-bench", "one two")


@pytest.fixture(scope="module")
def compared(place: Place) -> Scored:
    return judged.scored(place, "alpaca-eval", "one served")


def test_scores_are_means_of_what_the_judge_said(scored: Scored) -> None:
    told, found = lines(scored.out / "mt-bench" / "scores.jsonl"), records(scored.out, "mt-bench")
    assert len(told) == 2 * JUDGEMENTS
    assert len({one["score"] for one in told} - {None}) > 2  # or this shows little
    questions: dict[str, dict[int, list[float]]] = {model: {} for model in BOTH}
    for one in told:
        if one["score"] is not None:
            assert f"[{one['score']:g}]" in one["judge"]
            questions[one["model"]].setdefault(one["question"], []).append(one["score"])
    for model, scores in questions.items():
        value, error = mean(list(scores.values()))
        record = found[model, "all", "score"]
        assert (record["value"], record["standard_error"]) == (pytest.approx(value), pytest.approx(error))
        assert record["n"] == sum(map(len, scores.values())) == JUDGEMENTS - record["missing"]
        assert record["items"] == len(scores)
        assert shows(scored.ended, model, value, error, len(scores))
        assert {data for name, data, _ in found if name == model} == {
            "all",
            "turn 1",
            "turn 2",
            *mt_benching.CATEGORIES,
        }
        if model != "one":
            common = scores.keys() & questions["one"].keys()
            ours, theirs = (mean([of[key] for key in common])[0] for of in (scores, questions["one"]))
            assert record["difference_to_pivot"] == pytest.approx(ours - theirs)
            assert (record["compared_with"], record["difference_n"]) == ("one", len(common))
            half = students_t(len(common)) * record["difference_standard_error"]
            assert f"{ours - theirs:+.2f} ± {half:.2f}" in scored.ended.stdout


def test_the_key_goes_to_the_judge_and_nowhere_else(place: Place, scored: Scored, compared: Scored) -> None:
    assert place.judge.authorizations == {f"Bearer {KEY}"}
    assert place.model.authorizations == {"Bearer none"}
    assert tells_no_key(scored.out, scored.ended)
    assert tells_no_key(compared.out, compared.ended)


@pytest.mark.parametrize("suite", ["mt-bench", "alpaca-eval"])
def test_a_second_time_asks_nothing_and_prints_the_same(
    suite: str, place: Place, scored: Scored, compared: Scored
) -> None:
    first = scored if suite == "mt-bench" else compared
    expected, asked = (first.out / "results.json").read_bytes(), (place.judge.got, place.model.got)
    again = place.run(suite, first.out, models=first.models)
    assert (again.returncode, again.stdout) == (0, first.ended.stdout)
    if suite == "mt-bench":
        as_json = place.run(suite, first.out, "--json")
        assert json.loads(as_json.stdout) == json.loads(expected)["scores"]
    assert (first.out / "results.json").read_bytes() == expected
    assert (place.judge.got, place.model.got) == asked


def test_an_estimate_is_one_line_and_asks_nothing(place: Place, scored: Scored) -> None:
    out, asked = judged.answered(scored, "estimated"), place.judge.got
    ended = place.run("mt-bench", out, "--estimate")
    assert ended.returncode == 0, ended.stderr
    writes = f"at most {2048 * scored.calls:,} to write"
    line = rf"judge judge at {place.url}: {scored.calls} calls; about [\d,]+ tokens to read, {writes}\n"
    assert re.fullmatch(line, ended.stdout)
    assert place.judge.got == asked
    assert not (out / "results.json").exists()


def test_pairs_count_where_both_orders_agree(place: Place, scored: Scored) -> None:
    ended = place.run("mt-bench", scored.out, "--mode", "pairwise", "--baseline", "two")
    assert ended.returncode == 0, ended.stderr
    told, found = lines(scored.out / "mt-bench" / "verdicts.jsonl"), records(scored.out, "mt-bench")
    assert len(told) == 2 * JUDGEMENTS
    orders: dict[tuple[int, int], dict[str, str | None]] = {}
    for one in told:
        orders.setdefault((one["question"], one["turn"]), {})[one["model_is"]] = one["outcome"]
        assert (one["model"], one["against"]) == ("one", "two")
    assert all(both.keys() == {"A", "B"} for both in orders.values())
    known = [set(both.values()) for both in orders.values() if None not in both.values()]
    assert {"win", "loss"} <= set().union(*known)
    wins = [100.0 if both == {"win"} else 0.0 if both == {"loss"} else 50.0 for both in known]
    record = found["one", "all", "win_rate"]
    assert record["value"] == pytest.approx(statistics.fmean(wins))
    assert (record["n"], record["missing"]) == (len(known), JUDGEMENTS - len(known))
    shares = [found["one", "all", name]["value"] for name in ("wins", "ties", "losses")]
    assert shares == [pytest.approx(100 * wins.count(kind) / len(wins)) for kind in (100.0, 50.0, 0.0)]
    assert shows(ended, "one", record["value"], record["standard_error"], record["items"])
    assert ("two", "all", "win_rate") not in found
    assert found["one", "all", "score"]["n"] > 0  # of the other mode, still there


def test_win_rates_are_means_of_the_written_preferences(compared: Scored) -> None:
    found = records(compared.out, "alpaca-eval")
    rates: dict[str, list[float | None]] = {}
    for model in ("one", "served"):
        told = json.loads((compared.out / "alpaca-eval" / f"{model}.annotations.json").read_text(encoding="utf-8"))
        rates[model] = [None if one["preference"] is None else 100 * (one["preference"] - 1) for one in told]
        had = [value for value in rates[model] if value is not None]
        assert len(told) == LIMITS["alpaca-eval"]
        assert len(set(had)) > 2
        value, error = statistics.fmean(had), statistics.stdev(had) / math.sqrt(len(had))
        record = found[model, "all", "win_rate"]
        assert (record["value"], record["standard_error"]) == (pytest.approx(value), pytest.approx(error))
        assert (record["n"], record["missing"]) == (len(had), len(told) - len(had))
        assert shows(compared.ended, model, value, error, len(had))
        controlled = found[model, "all", "length_controlled_win_rate"]
        assert controlled["value"] is None
        assert controlled["why"] == "needs AlpacaEval's 805 instructions, all of them and in their order"
    pairs = zip(rates["served"], rates["one"], strict=True)
    differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    assert found["served", "all", "win_rate"]["difference_to_pivot"] == pytest.approx(statistics.fmean(differences))


def test_the_published_annotations(tmp_path: Path) -> None:
    file = alpaca_evaluating.write(tmp_path / "m.annotations.json", alpaca_evaluating.made_up())
    out = ["--out", str(tmp_path / "results.json")]
    command = ["eval", "alpaca-eval", "--annotations", str(file), *out]
    table = here(*command, **RUNS)
    rate = 100 * statistics.fmean(one["preference"] - 1 for one in alpaca_evaluating.made_up())
    assert re.search(rf" {rate:.2f} ± \d\.\d\d ", table.stdout)
    values = [one["value"] for one in json.loads(here(*command, "--json", **RUNS).stdout)]
    assert values == [pytest.approx(rate), None], "they are not AlpacaEval's instructions"


def test_the_first_of_805_instructions(place: Place, tmp_path: Path) -> None:
    alpaca_evaluating.write(tmp_path / "m.annotations.json", alpaca_evaluating.made_up())
    more = ("--data", str(tmp_path), "--limit", "1")
    asked = place.judge.got
    ended = place.run("alpaca-eval", place.root / "published", *more, models="served")
    assert ended.returncode == 0, ended.stderr
    assert place.judge.got == asked + 1
    record = records(place.root / "published", "alpaca-eval")["served", "all", "win_rate"]
    assert record["n"] + record["missing"] == 1
    assert record["settings"]["baseline"] == "gpt4_1106_preview"


def test_faults_cost_what_cannot_be_had_and_nothing_else(place: Place, scored: Scored) -> None:
    out = judged.answered(scored, "faults")
    place.judge.script(FAULTS)
    ended = place.run("mt-bench", out, "--timeout", "2")
    assert ended.returncode == 0, ended.stderr
    expected, found = (lines(where / "mt-bench" / "scores.jsonl") for where in (scored.out, out))
    lost = [now for before, now in zip(expected, found, strict=True) if before != now]
    assert {one["why"] for one in lost} == {
        "the judge's text has no score from 1 to 10",
        "status 400: told to say 400",
    }
    for model in BOTH:
        missing = sum(one["model"] == model and one["score"] is None for one in found)
        record = records(out, "mt-bench")[model, "all", "score"]
        assert (record["missing"], record["n"]) == (missing, JUDGEMENTS - missing)
        assert missing == 0 or f"{missing} missing" in ended.stdout
    asked = place.judge.got
    assert place.run("mt-bench", out).returncode == 0  # what was refused is asked again, what was answered is not
    assert place.judge.got == asked + 1
    assert all(one["judge"] for one in lines(out / "mt-bench" / "scores.jsonl"))


def test_a_killed_run_goes_on_where_it_was(place: Place, scored: Scored) -> None:
    out = judged.answered(scored, "killed")
    journal = out / "mt-bench" / "judgements.jsonl"
    place.memory.pauses_after = len(place.memory.asked) + 9
    process = Command(*place.command("mt-bench", out, "--concurrency", "3"), **RUNS)
    while len(journal_keys(journal) if journal.exists() else ()) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    place.memory.go_on.set()
    place.judge.settle()
    kept, asked = journal_keys(journal), place.judge.got
    assert 6 <= len(kept) < scored.calls
    ended = place.run("mt-bench", out)
    assert ended.returncode == 0, ended.stderr
    assert place.judge.got - asked == scored.calls - len(kept)
    assert len(set(journal_keys(journal))) == len(journal_keys(journal)) == scored.calls
    same = [(where / "mt-bench" / "scores.jsonl").read_bytes() for where in (out, scored.out)]
    assert same[0] == same[1]
    assert ended.stdout.replace(str(out), str(scored.out)) == scored.ended.stdout


def test_a_judge_that_cannot_be_asked(place: Place, scored: Scored) -> None:
    out = judged.answered(scored, "refused")
    who = f"--judge-url: the server at {place.url}:"
    place.judge.script(["401"] * 50)
    ended = place.run("mt-bench", out)
    names = "FUSECHAT_JUDGE_KEY or OPENAI_API_KEY in the environment has to hold it"
    refused(ended, f"{who} refuses the key; {names}")
    assert tells_no_key(out, ended)
    place.judge.script(["404"] * 50)
    wrong = "has no model judge, or the URL is not the one that ends in /v1 (status 404: told to say 404)"
    refused(place.run("mt-bench", out), f"{who} {wrong}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        ended = place.run("mt-bench", out, "--judge-url", nobody)
    refused(ended, f"--judge-url: the server at {nobody}: no connection (Connection refused); is it running?")
    place.judge.script([])
    assert not (out / "results.json").exists()


def test_how_requests_are_sent_is_the_same_for_models(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def client(**options: Any) -> None:
        seen.update(options)
        raise ModelError("enough")

    monkeypatch.setattr("fusechat.evaluate.answers.Client", client)
    more = ("--concurrency", "3", "--timeout", "7")
    with pytest.raises(ModelError, match="enough"):
        app(place.command("mt-bench", tmp_path, *more, models="served"), standalone_mode=False)
    assert (seen["concurrency"], seen["timeout"]) == (3, 7.0)
    with pytest.raises(RecipeError, match="--baseline: nothing is compared with it"):
        app(place.command("mt-bench", tmp_path, "--baseline", "two"), standalone_mode=False)
