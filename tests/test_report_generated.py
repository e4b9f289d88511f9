"""What the report tells of answers: counts by hand, prompts from unsure to sure, no text that becomes markup, a bounded page."""

import math
from pathlib import Path
from typing import Any

import pytest

from fusechat.recipe.generate import Choose
from fusechat.report.authors import SETS, author_figures, largest, marks, places
from fusechat.report.examples import CANDIDATES, EXAMPLES, MESSAGES, examples, pick
from fusechat.report.page import render_page
from fusechat.report.teaching import choice_rows
from reporting import HOSTILE, Elements, contents, generated, line, read

LIKELIHOOD = Choose(by="likelihood")


def scores(pivot: float | None, one: float | None, two: float | None) -> dict[str, float | None]:
    return {"pivot": pivot, "one": one, "two": two}


@pytest.fixture
def lines(tmp_path: Path) -> list[Any]:
    """Words: `one` and `two` agree, then `one` is chosen, then `two`, which is not kept; sums: `two` alone, then nobody."""
    both, first, second = {"one": 1, "two": 1}, {"one": 1}, {"two": 1}
    return read(
        tmp_path,
        line("w1", ("same", both, scores(1.0, 1.0, 1.0)), data=["words"]),
        line("w2", ("a", first, scores(1.0, 2.0, 3.0)), ("b", second, scores(2.0, 4.0, 6.0)), data=["words"]),
        line(
            "w3",
            ("a", first, scores(9.0, 9.0, None)),
            ("b", second, scores(1.0, 3.0, 7.0)),
            data=["words"],
            chosen=1,
            author="two",
            kept=False,
        ),
        line("s1", ("c", second, scores(0.5, 0.5, 0.5)), data=["sums"], no_candidates={"one": ["it is empty"]}),
        line("s2", data=["sums"], chosen=None, kept=False, no_candidates={"two": ["it is empty"]}),
    )


def test_what_is_counted_of_each_author_on_each_set(lines: list[Any]) -> None:
    everything, words, sums = places(lines, ["one", "two"], "likelihood")
    assert [
        (place.data, place.prompts, place.kept, place.several, place.same) for place in (everything, words, sums)
    ] == [
        ("", 5, 3, 3, 1),
        ("words", 3, 2, 3, 1),
        ("sums", 2, 1, 0, 0),
    ]
    one, two = everything.authors.values()
    assert (one.asked, one.answered, one.best, one.taught) == (4, 3, 2, 2)
    assert (two.asked, two.answered, two.best, two.taught) == (5, 4, 3, 1)
    assert one.share == 2 / 4
    assert one.score == pytest.approx((1.0 + 2.0 + 9.0) / 3), "of w3 model two scores one candidate only"
    assert words.authors["two"].score == pytest.approx((1.0 + 4.0 + 2.0) / 3)
    assert sums.authors["one"].score is None
    own = places(lines, ["one", "two"], "self")[0].authors
    assert own["two"].score == pytest.approx((1.0 + 6.0 + 7.0 + 0.5) / 4)
    (alone,) = places(lines[:3], ["one", "two"], "likelihood")
    assert alone.prompts == 3, "a single set is not told twice"


def test_what_judges_say_is_the_score_where_they_choose(tmp_path: Path) -> None:
    judged = line("p", ("a", {"one": 2}, {"one": 1.0}))
    judged["candidates"][0]["judged"] = 7.0
    del judged["data"]  # as older versions wrote it
    (found,) = places(read(tmp_path, judged), ["one"], "judge")
    assert found.authors["one"].score == 7.0


def test_every_author_has_a_dot_in_the_row_of_each_set(lines: list[Any]) -> None:
    best, score = author_figures(places(lines, ["one", "two"], "likelihood"), "nats per byte")
    assert best.layout["yaxis"]["ticktext"] == ["all prompts", "words", "sums"]
    assert [trace["name"] for trace in best.data] == ["one", "two"]
    assert best.data[0]["x"] == [50.0, pytest.approx(66.667), 0.0]
    assert best.data[1]["y"] == [0.125, 1.125, 2.125]
    assert len(score.data[0]["x"]) == 2, "no score, no dot"
    (alone, _) = author_figures(places(lines[:3], ["one", "two"], "likelihood"), "nats per byte")
    assert alone.layout["yaxis"]["ticktext"] == ["one", "two"]
    assert [trace["y"] for trace in alone.data] == [[0], [1]]
    drawn = marks(["a", "b", "pivot", "c", "d", "e", "f", "g"])
    assert len({(mark.symbol, mark.colour) for mark in drawn.values()}) == len(drawn)


def sureness(index: int) -> float:
    """Of prompt `index` in `unsure`: likelihoods of 1 and exp(-index)."""
    return 1 - math.exp(-index)


def unsure(count: int) -> list[dict[str, Any]]:
    """Prompts whose second candidate is the further behind, the higher their number; in an order that tells nothing."""
    return [
        line(f"p{index}", ("best", {"one": 1}, {"one": 0.0}), ("second", {"two": 1}, {"one": float(index)}))
        for index in sorted(range(count), key=lambda index: index * 7 % count)
    ]


def test_prompts_are_spread_from_the_least_sure_to_the_surest(tmp_path: Path) -> None:
    found = read(tmp_path, *unsure(9))
    picked = pick(found, LIKELIHOOD, 0)
    assert [found[place][0]["prompt_id"] for place in picked] == ["p0", "p2", "p4", "p6", "p8"]
    assert list(picked.values()) == ["least sure", "surer than 25%", "surer than 50%", "surer than 75%", "surest"]
    assert sureness(0) < sureness(2) < sureness(8)
    shown = examples(found, picked)
    assert [one.prompt[0][1].text for one in shown] == ["p0", "p2", "p4", "p6", "p8"]
    alone = [line(f"q{index}", ("only", {"one": 1}, {"one": float(index)})) for index in range(20)]
    mixed = read(tmp_path, *alone, *unsure(3), line("none", chosen=None, kept=False))
    picked = pick(mixed, LIKELIHOOD, 0)
    assert [mixed[place][0]["prompt_id"] for place in picked] == ["p0", "p1", "p2", "q19", "q0"]
    assert list(picked.values())[2:] == ["surest", "one candidate", "one candidate"]
    assert set(pick(found, Choose(by="random"), 0).values()) == {"at random"}
    assert len(pick(found[:1], LIKELIHOOD, 0)) == 1
    assert pick([], LIKELIHOOD, 0) == {}


def test_all_candidates_are_shown_with_the_chosen_one_first_and_marked(tmp_path: Path, lines: list[Any]) -> None:
    shown = {one.prompt[0][1].text: one for one in examples(lines, dict.fromkeys(range(4), "least sure"))}
    third = shown["w3"]
    assert [(one.text.text, one.authors, one.is_chosen) for one in third.candidates] == [
        ("b", ("two",), True),
        ("a", ("one",), False),
    ]
    assert third.models == ("pivot", "one", "two")
    assert third.candidates[1].scores == (9.0, 9.0, None)
    assert [one.mean for one in third.candidates] == [2.0, 9.0]
    assert shown["w1"].candidates[0].authors == ("one", "two")
    html = render_page(contents(generated=generated(lines)))
    page = Elements(html)
    rows = [attributes for attributes, _ in page.named("tr") if attributes.get("class") == "chosen"]
    said = [text for attributes, text in page.named("strong") if attributes.get("class") == "mark"]
    assert len(rows) == len(said) == 4
    assert set(said) == {"✓ chosen"}, "not by colour alone"
    assert "not learned: less sure than those that are kept" in html
    assert {a["id"] for a, _ in page.named("section")} >= {"generated", "costs"}
    assert "It learned one answer to each of 3 prompts, chosen among the models' own: one 2 (67%), two 1 (33%)." in html


def test_long_texts_are_folded_and_many_are_cut(tmp_path: Path) -> None:
    huge = "\n".join(["x" * 50] * 200)
    many = [(f"{index} {huge}", {f"m{index}": 1}, {"m0": 1.0}) for index in range(50)]
    history = [{"role": "user", "content": f"{index} {huge}"} for index in range(40)]
    found = read(tmp_path, *(line(f"p{index}", *many, messages=history, chosen=40) for index in range(6)))
    shown = examples(found, pick(found, LIKELIHOOD, 0))
    assert len(shown) == EXAMPLES
    for one in shown:
        assert (len(one.candidates), one.more) == (CANDIDATES, 50 - CANDIDATES)
        assert (len(one.prompt), one.earlier) == (MESSAGES, 40 - MESSAGES)
        assert one.candidates[0].is_chosen
        assert all(said.text.opening and said.text.cut for said in one.candidates)
    sets = [line(f"s{index}", ("a", {"one": 1}, {"one": 1.0}), data=[f"set {index}"]) for index in range(200)]
    spread = read(tmp_path, *sets, line("again", ("a", {"one": 1}, {"one": 1.0}), data=["set 150"]))
    every = places(spread, ["one"], "likelihood")
    assert len(every) == 201
    kept = largest(every)
    assert len(kept) == 1 + SETS
    assert [place.data for place in kept[1:]] == [f"set {index}" for index in (*range(SETS - 1), 150)]
    html = render_page(contents(generated=generated(found)))
    assert len(html.encode()) < 2_500_000
    assert html == render_page(contents(generated=generated(found)))
    assert f"and {50 - CANDIDATES} more candidates" in html
    assert f"The {SETS} sets with the most prompts are shown, of 200." in render_page(
        contents(generated=generated(spread))
    )


@pytest.mark.parametrize("text", [HOSTILE, "🐕 👩‍👩‍👧 \u202eשלום עולם", "<b>bold</b>\n```\n{{ 7 * 7 }}\n```" * 40])
def test_no_text_of_an_answer_becomes_markup(tmp_path: Path, text: str) -> None:
    def page(said: str) -> Elements:
        asked = [{"role": "user", "content": said}]
        found = read(tmp_path, line("p", (said, {"one": 1}, {"one": 1.0}), data=[said], messages=asked))
        return Elements(render_page(contents(generated=generated(found, said))))

    plain, other = page("x\n" * text.count("\n") + "x" * (len(text) - 2 * text.count("\n"))), page(text)
    assert [(tag, sorted(attributes)) for tag, attributes, _ in other.found] == [
        (tag, sorted(attributes)) for tag, attributes, _ in plain.found
    ]
    said = [words for attributes, words in other.named("div") if attributes.get("class") == "said"]
    assert text in said
    assert all(a.get("dir") == "auto" for a, _ in other.named("div") if a.get("class") == "said")


def test_sets_of_one_kind_are_one_row_of_who_taught() -> None:
    aside = {"ties": 0.0, "without comparison": 0.0}
    counts = {
        "answers": {
            "level": "conversation",
            "chosen": {"answers-one": {"one": 3.0, "none": 0.0, **aside}, "answers-big": {"none": 1.0, **aside}},
        },
        "sft": {"level": "conversation", "chosen": {"answers": {"none": 4.0, **aside}}},
    }
    sets = dict.fromkeys(("answers", "answers-one", "answers-big"), "chosen answers")
    rows = choice_rows(counts, sets)
    assert [(row.target, row.data, row.total, row.taught_by) for row in rows] == [
        ("answers", "chosen answers", 4.0, (("one", 3.0, 0.75), ("none", 1.0, 0.25))),
        ("sft", "chosen answers", 4.0, ()),
    ]
    assert len(choice_rows(counts)) == 3
