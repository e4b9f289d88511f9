"""The first screen of a report: did it work, by how much, what did the sources bring; sentences from results by hand."""

import json
import re
import statistics
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import runs
from fusechat.commands.evaluate_models import Evaluation
from fusechat.evaluate import stage
from fusechat.evaluate.records import About, Measurement, keep, records
from fusechat.evaluate.subjects import Subject
from fusechat.pipeline import build_steps, load_recipe
from fusechat.report.page import render_page
from fusechat.report.results import result_tables
from fusechat.report.summary import Answer, Line, print_results, summarise
from fusechat.run.files import read_json, write_json
from reporting import compared, contents, record, results, students_t

ROLES = {"llama": "pivot", "sft": "target", "tiny": "fused"}
ABOUT = {name: About(role, name, None) for name, role in ROLES.items()}


def measured(suite: str, data: str, metric: str, *, higher: bool, **models: list[float]) -> list[dict[str, Any]]:
    """Records of models by their values on each item, all items of one weight."""
    found = {
        name: [
            Measurement(data, metric, {str(at): (one, 1) for at, one in enumerate(values)}, 0, higher_is_better=higher)
        ]
        for name, values in models.items()
    }
    how: dict[str, Any] = {"models": ABOUT, "settings": {}, "versions": {}}
    return records(suite, found, pivot="llama", sft="sft", **how)


def bits(data: str = "data-held-out", **models: list[float]) -> list[dict[str, Any]]:
    return measured("bits-per-byte", data, "bits_per_byte", higher=False, **models)


def headlines(*scores: dict[str, Any], sft: str | None = "sft") -> list[str]:
    return [answer.headline for answer in summarise(results(*scores), sft)]


def test_three_answers_by_hand() -> None:
    """Means 2, 1.4 and 1.5. To the pivot -0.5, -0.6, -0.4: mean -0.5, standard error 0.1 / √3, t of 2 degrees 4.303: half of
    the interval is 0.2484, of the pivot's 2 it is 12%. To plain fine-tuning +0.1 each: an interval of no width, 7.1% of 1.4."""
    scores = bits(llama=[1, 2, 3], sft=[0.4, 1.3, 2.5], tiny=[0.5, 1.4, 2.6])
    worked, how_much, beyond = summarise(results(*scores), "sft")
    assert worked == Answer(
        "Did it work?",
        "Yes: better than the pivot",
        (Line("better", True, "data: -0.5000 ± 0.2484 bits per byte"),),
    )
    assert (how_much.question, how_much.headline) == ("By how much?", "25% fewer bits per byte")
    assert how_much.lines == (Line("", None, "data: 25% ± 12% fewer, 2.0000 → 1.5000"),)
    assert "95% interval of the paired difference" in how_much.note
    assert (beyond.question, beyond.headline) == (
        "What did the sources bring beyond plain fine-tuning?",
        "Worse than plain fine-tuning",
    )
    assert beyond.lines == (Line("worse", False, "data: +0.1000 ± 0.0000 bits per byte, 7.1% more"),)
    assert "target sft: the pivot, trained on the same conversations without" in beyond.note
    assert not beyond.code


def test_several_data_sets_are_counted() -> None:
    """Against the pivot's 1.5, with 20 items: half of the interval is 2.093 standard errors."""

    def found(*differences: float) -> list[str]:
        named = [(f"{place}-held-out", difference) for place, difference in enumerate(differences)]
        return headlines(
            *(record(data=data) for data, _ in named),
            *(compared(difference, 0.01, data=data) for data, difference in named),
            sft=None,
        )[:2]

    assert found(-0.15, -0.75) == [
        "Yes: better than the pivot on both data sets",
        "10% to 50% fewer bits per byte",
    ]
    assert found(-0.15, -0.3, -0.75)[0] == "Yes: better than the pivot on all 3 data sets"
    assert found(-0.15, 0.0209, 0.03) == [
        "Partly: better than the pivot on 1 of 3 data sets, worse on 1, no measurable difference on 1",
        "10% fewer to 2.0% more bits per byte",
    ]
    assert found(-0.15, 0.0) == [
        "Partly: better than the pivot on 1 of 2 data sets, no measurable difference on 1",
        "10% fewer bits per byte",
    ]
    assert found(0.15, 0.0) == [
        "No: worse than the pivot on 1 of 2 data sets, no measurable difference on 1",
        "10% more bits per byte",
    ]
    assert found(0.0) == ["No measurable difference to the pivot", "Too little to measure"]


def test_what_the_sources_brought_is_not_known_without_plain_fine_tuning() -> None:
    """Nor from results that were written before there was such a comparison, nor where that target was not measured."""
    for scores in ([record(), compared(-0.5, 0.1)], bits(llama=[1, 2], tiny=[0.5, 1.4])):
        *_, beyond = summarise(results(*scores), None)
        assert (beyond.headline, beyond.code) == ("Not known", "targets: {sft: []}")
        *_, beyond = summarise(results(*scores), "plain")
        assert (beyond.headline, beyond.code) == ("Not measured", "")
        assert "target plain" in beyond.note


def test_nothing_measured_is_said() -> None:
    (only,) = summarise(None, "sft")
    assert (only.question, only.headline, only.lines) == ("Did it work?", "Not measured", ())
    assert "data.validation" in only.note
    lost = compared(None, None, value=None, why="nothing to measure")
    (only,) = summarise(results(record(), lost), None)
    assert only.lines == (Line("not measured", None, "data: nothing to measure"),)
    assert headlines(record(role="", model="b")) == ["Not measured"]
    assert "Not measured" in render_page(contents(tables=[], summary=summarise(None, None)))


def test_without_an_interval_nothing_is_told() -> None:
    """One conversation has no standard error; a pivot's value of 0 is nothing that a percentage could be of."""
    worked, how_much, _ = summarise(results(*bits(llama=[2], tiny=[1])), None)
    assert (worked.headline, how_much.headline) == (
        "Cannot be told: no difference has an interval",
        "Cannot be told",
    )
    assert worked.lines == (Line("no interval", None, "data: -1.0000 bits per byte"),)
    assert how_much.lines == (Line("", None, "data: 50% fewer, 2.0000 → 1.0000"),)
    scores = measured("harness", "sums", "exact_match,none", higher=True, llama=[0, 0, 0], tiny=[1, 1, 1])
    worked, how_much, _ = summarise(results(*scores), None)
    assert worked.headline == "Yes: better than the pivot"
    assert how_much.lines == (Line("", None, "sums: 0.0000 → 1.0000"),)


def test_suites_are_told_beside_bits_per_byte() -> None:
    """MT-Bench by its whole alone, many tasks by their number; a metric that is better neither way is left out. The score 6 of 5
    is 20% more; its differences 1, 2 and 0 have mean 1 and standard error 1 / √3, so that 0 is in the interval."""
    scores = bits(llama=[2, 2.1, 2.2], sft=[1, 1, 1], tiny=[1, 1.2, 1.1])
    scores += measured("mt-bench", "all", "score", higher=True, llama=[4, 5, 6], tiny=[5, 7, 6])
    scores += measured("mt-bench", "turn 1", "score", higher=True, llama=[1, 1, 1], tiny=[0, 0, 0])
    for place in range(6):
        values = [place - 2.0] * 3  # of the first two tasks it is worse, of the third the same
        scores += measured(
            "harness", f"task {place}", "acc,none", higher=True, llama=[1, 1, 1], tiny=[1 + v for v in values]
        )
    ties = {"suite": "harness", "data": "task 0", "metric": "ties", "higher_is_better": None}
    scores += [record(**ties), compared(1.0, 0.1, **ties)]
    worked, how_much, beyond = summarise(results(*scores), "sft")
    assert worked.headline == (
        "Partly: better than the pivot in 4 of 8 comparisons, worse in 2, no measurable difference in 2"
    )
    assert [line.text for line in worked.lines[1:]] == [
        "MT-Bench: +1.00 ± 2.48 score",
        "Evaluation harness: better in 3 of 6 comparisons, worse in 2, no measurable difference in 1",
    ]
    assert worked.lines[1].verdict == "no measurable difference"
    assert how_much.headline == "48% fewer bits per byte"  # 1.1 of 2.1
    assert [line.text for line in how_much.lines[1:]] == [
        "MT-Bench: 20% ± 50% higher, 5.00 → 6.00",
        "Evaluation harness: 200% lower to 300% higher acc",
    ]
    assert [(line.verdict, line.text) for line in beyond.lines[1:]] == [
        ("not measured", "MT-Bench, score"),
        ("", "Evaluation harness: 6 not measured"),
    ]


numbers = st.floats(0.1, 10)
sets = st.lists(st.lists(st.tuples(numbers, numbers, numbers), min_size=2, max_size=8), min_size=1, max_size=4)


@settings(max_examples=60)
@given(sets, st.booleans())
def test_no_verdict_contradicts_its_interval(drawn: list[list[tuple[float, float, float]]], higher: bool) -> None:
    """The interval by SciPy's t and the differences of the items; as printed, and as the tables have it."""
    pytest.importorskip("scipy")
    scores = []
    for place, items in enumerate(drawn):
        pivot, sft, fused = (list(values) for values in zip(*items, strict=True))
        scores += measured("bits-per-byte", str(place), "m", higher=higher, llama=pivot, sft=sft, tiny=fused)
    worked, _, beyond = summarise(results(*scores), "sft")
    for answer, other in ((worked, 0), (beyond, 1)):
        verdicts = []
        for line, items in zip(answer.lines, drawn, strict=True):
            differences = [item[2] - item[other] for item in items]
            mean = statistics.fmean(differences)
            half = students_t(len(items)) * statistics.stdev(differences) / len(items) ** 0.5
            if abs(abs(mean) - half) > 1e-9:
                good = (mean > 0) == higher if abs(mean) > half else None
                assert line.good is good, (mean, half)
            difference, width = map(float, re.findall(r": ([+-][\d.]+) ± ([\d.]+) m", line.text)[0])
            assert abs(difference) >= width if line.good is not None else abs(difference) <= width
            word = {True: "better", False: "worse", None: "no measurable difference"}[line.good]
            assert line.verdict == word
            verdicts.append(line.good)
        assert ("better than" in answer.headline.lower()) == (True in verdicts)
        assert ("worse" in answer.headline.lower()) == (False in verdicts)
        assert ("no measurable" in answer.headline.lower()) == (None in verdicts)
    assert worked.headline.startswith("Yes") == all(line.good for line in worked.lines)
    fused = next(row for row in result_tables(results(*scores))[0].rows if row.role == "fused")
    assert [cell.better for cell in fused.cells] == [line.good for line in worked.lines]


def test_the_terminal_begins_with_the_same_answers(tmp_path: Path) -> None:
    def printed() -> str:
        console = Console(file=StringIO(), width=200)
        print_results(console, tmp_path / "results.json", "[red]tiny")
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    assert printed().startswith("Did it work? Not measured. No result has both the fused model and the pivot.")
    write_json(tmp_path / "results.json", results(record(), compared(-0.15, 0.01)))
    first, *rest = printed().splitlines()
    assert first == "Did it work? Yes: better than the pivot. By how much? 10% fewer bits per byte."
    assert "[red]tiny" in "".join(rest)


def test_the_page_shows_the_answers_above_the_tables() -> None:
    scores = results(*bits(llama=[1, 2, 3], sft=[0.4, 1.3, 2.5], tiny=[0.5, 1.4, 2.6]))
    for sft in ("sft", None):
        answers = summarise(scores, sft)
        header = render_page(contents(tables=result_tables(scores), summary=answers)).partition("</header>")[0]
        header = header.replace("\u00a0", " ")
        for answer in answers:
            for text in (answer.question, f"<b>{answer.headline}</b>", *(line.text for line in answer.lines)):
                assert text in header
            assert f"<code>{answer.code}</code>" in header or not answer.code
        assert ('<strong class="bad">worse</strong>' in header) == (sft is not None)
        assert '<strong class="good">better</strong>' in header


def test_results_of_a_run_are_compared_with_its_plain_fine_tuning(tmp_path: Path) -> None:
    """Bits per byte of each step's file, by hand: 8 ln 2 nats of 8 bytes are one bit per byte. What a suite found of a target that
    has been trained again since does not count."""
    bit, subjects = 8 * 0.6931471805599453, []
    for name, role, values in (
        ("pivot", "pivot", (3, 3)),
        ("target-sft", "target", (1, 2)),
        ("fused", "fused", (2, 2)),
    ):
        directory = tmp_path / name
        write_json(directory / "d.json", {str(place): [[value * bit, 8]] for place, value in enumerate(values)})
        how = {"dtype": "float32", "batch_tokens": 1, "device": None}
        step = SimpleNamespace(name=name, directory=directory, settings=how)
        model = SimpleNamespace(tokenizer_identity=f"id of {name}")
        subjects.append(SimpleNamespace(role=role, label=name.removeprefix("target-"), step=step, chat_model=model))
    found = {"p": [Measurement("all", "score", {"a": (1, 1)}, 0)], "f": [Measurement("all", "score", {"a": (3, 1)}, 0)]}
    for suite, identity in (("now", "id of target-sft"), ("before", "another")):
        about = {"p": About("", "p", identity), "f": About("fused", "f", "id of fused")}
        own = records(suite, found, models=about, pivot=None, sft="p", settings={}, versions={})
        keep(tmp_path / suite, own)
    stage._results(tmp_path, subjects, ["d"], "target-sft", None)  # type: ignore[arg-type]
    by = {(one["suite"], one["model"]): one for one in read_json(tmp_path / "results.json")["scores"]}
    of = by["bits-per-byte", "fused"]
    assert (of["sft_target"], of["sft_identity"], of["difference_to_sft_n"]) == ("sft", "id of target-sft", 2)
    assert of["difference_to_sft"] == pytest.approx(0.5)  # 1 and 0
    assert of["difference_to_sft_standard_error"] == pytest.approx(0.5)
    assert of["difference_to_pivot"] == pytest.approx(-1)
    assert by["bits-per-byte", "sft"]["difference_to_sft"] is None
    assert by["now", "f"]["difference_to_sft"] == 2
    assert (by["before", "f"]["sft_target"], by["before", "f"]["difference_to_sft"]) == (None, None)
    assert json.dumps(by["before", "f"]).count("another") == 0


def test_plain_fine_tuning_is_the_first_target_without_sources(models: dict[str, Path], tmp_path: Path) -> None:
    """Without one the step of the results is what it was before there was such a comparison."""
    path = runs.write_recipe(tmp_path, models)
    for changes, expected in (
        ([], None),
        (["targets={all: [mistral, gemma]}"], None),
        (["targets={all: [mistral, gemma], plain: [], sft: []}"], "plain"),
    ):
        recipe = load_recipe(path, changes)
        assert recipe.sft_target() == expected
        step = next(step for step in build_steps(recipe, tmp_path / "work") if step.name == "results")
        assert step.settings.get("sft") == (expected and f"target-{expected}")
        subjects = tuple(Subject("target", f"{name} (target)", name=f"target-{name}") for name in ("gemma", "plain"))
        of_run = Evaluation("s", subjects, tmp_path, tmp_path, None, recipe)
        assert of_run.sft == (expected and "plain (target)")
