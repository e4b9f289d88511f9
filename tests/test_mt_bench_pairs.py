"""Pairwise comparison of MT-Bench: both orders of every turn against one baseline, and what two verdicts come to."""

import re
from pathlib import Path
from random import Random

import pytest

import mt_benching
from cases import each
from fusechat.errors import RecipeError
from fusechat.evaluate.mt_bench.data import MtBench, load
from fusechat.models.answers import Missing
from mt_benching import OURS, THEIRS, THIRD, Judge, Models, lines, measured


@pytest.fixture
def data(tmp_path: Path) -> MtBench:
    return load(mt_benching.write(tmp_path / "data"))


def places(text: str) -> tuple[str, str, str]:
    """Labels of assistants A and B, and the key, of a request of pairwise comparison."""
    found = re.search(r"A <(?:[^|>]*\|)?([^|> ]*) (\d+/\d)> B <(?:[^|>]*\|)?([^|> ]*) \d+/\d>$", text)
    assert found
    return found[1], found[3], found[2]


def test_pairs_by_hand(tmp_path: Path, data: MtBench) -> None:
    def say(text: str) -> str:
        a, _, key = places(text)
        ours_first = a == "ours"
        better = {"81/1": "ours", "81/2": "ours", "82/1": "theirs"}.get(key)  # whoever comes first
        if better:
            return "[[A]]" if a == better else "[[B]]"
        if key == "83/1":
            return "[[A]]"  # the first place: a tie
        if key == "84/2":
            return "[[A]]" if ours_first else "no verdict"
        if key == "85/1":
            return "[[A]]" if ours_first else "[[C]]"  # differ: a tie
        return "[[C]]"

    judge = Judge(say)
    found, settings = measured(tmp_path, data, judge, Models(), [THEIRS, OURS], mode="pairwise")
    assert len(judge.calls[0]) == 2 * 8 * 2
    assert judge.calls[0][0].messages[1][1] == "Q <first 81?> A <ours 81/1> B <theirs 81/1>"
    assert judge.calls[0][1].messages[1][1] == "Q <first 81?> A <theirs 81/1> B <ours 81/1>"
    assert settings["baseline"] == "theirs"
    assert settings["prompts"] == ["pair-math-v1", "pair-math-v1-multi-turn", "pair-v2", "pair-v2-multi-turn"]
    assert found["theirs"] == {}
    rates = found["ours"]
    assert rates["all", "win_rate"].items["81"] == (200, 2)
    assert rates["all", "win_rate"].items["82"] == (50, 2)
    assert rates["all", "win_rate"].items["84"] == (50, 1)
    assert rates["all", "win_rate"].missing == 1  # one pair of orders, one missing
    # of 15: two wins, one loss, twelve ties
    assert rates["all", "win_rate"].estimate.value == pytest.approx(100 * (2 + 12 / 2) / 15)
    assert rates["all", "wins"].estimate.value == pytest.approx(100 * 2 / 15)
    assert rates["all", "ties"].estimate.value == pytest.approx(100 * 12 / 15)
    assert rates["all", "losses"].estimate.value == pytest.approx(100 * 1 / 15)
    assert rates["writing", "win_rate"].estimate.value == 100
    assert rates["turn 2", "win_rate"].missing == 1
    better = {metric: rates["all", metric].higher_is_better for metric in ("win_rate", "wins", "ties", "losses")}
    assert better == {"win_rate": True, "wins": True, "ties": None, "losses": False}
    rows = lines(tmp_path)
    expected = {"model": "ours", "question": 81, "turn": 1, "category": "writing", "against": "theirs"}
    assert rows[1] == expected | {"model_is": "B", "outcome": "win", "judge": "[[B]]", "why": None}
    assert [row["why"] for row in rows if row["outcome"] is None] == ["the judge's text has no verdict"]


def test_a_named_baseline_and_its_missing_answer(tmp_path: Path, data: MtBench) -> None:
    judge = Judge(lambda text: "[[A]]" if places(text)[0] == "ours" else "[[B]]")
    models = Models({("ours", "81/1"): Missing("no")})
    found, _ = measured(tmp_path, data, judge, models, [THEIRS, OURS, THIRD], mode="pairwise", baseline="ours")
    assert set(found) == {"theirs", "ours", "third/model"}
    assert found["ours"] == {}
    for label in ("theirs", "third/model"):
        assert found[label]["all", "win_rate"].missing == 2
        assert found[label]["all", "win_rate"].estimate.value == 0
    assert {row["why"] for row in lines(tmp_path) if row["outcome"] is None} == {
        "the baseline has no answer to turn 1: no"
    }


def test_bad_baselines(tmp_path: Path, data: MtBench) -> None:
    models = Models()
    with pytest.raises(RecipeError, match=r"^--baseline: gpt is none of the models: ours, theirs$"):
        measured(tmp_path, data, Judge(str), models, [OURS, THEIRS], mode="pairwise", baseline="gpt")
    with pytest.raises(RecipeError, match="needs a second model"):
        measured(tmp_path, data, Judge(str), models, [OURS], mode="pairwise")
    assert models.asked == []


@each("seed", range(5))
def test_win_rates_as_a_loop_over_the_lines_finds_them(tmp_path: Path, seed: int) -> None:
    """From the judge's words and the model's place alone, as a table of the four words' pairs."""
    data, random = load(mt_benching.write(tmp_path / "data", each=2)), Random(seed)
    judge = Judge(lambda text: random.choice(["[[A]]", "[[B]]", "[[C]]", "?"]))
    found, _ = measured(tmp_path, data, judge, Models(), [OURS, THEIRS], mode="pairwise", baseline="theirs")
    pairs: dict[tuple[int, int], dict[str, str]] = {}
    category = {}
    for row in lines(tmp_path):
        pairs.setdefault((row["question"], row["turn"]), {})[row["model_is"]] = row["judge"]
        category[row["question"]] = row["category"]
    points = {("[[A]]", "[[B]]"): 100, ("[[B]]", "[[A]]"): 0}  # what is said with the model as A, and as B
    for (name, metric), one in found["ours"].items():
        if metric != "win_rate":
            continue
        inside = [pair for (number, turn), pair in pairs.items() if name in ("all", f"turn {turn}", category[number])]
        kept = [points.get((pair["A"], pair["B"]), 50) for pair in inside if "?" not in pair.values()]
        assert one.estimate.value == pytest.approx(sum(kept) / len(kept)) if kept else one.estimate.value is None
        assert one.missing == len(inside) - len(kept)
    wins, ties, losses = (found["ours"]["all", share].estimate.value or 0 for share in ("wins", "ties", "losses"))
    assert wins + ties + losses == pytest.approx(100)
    assert wins + ties / 2 == pytest.approx(found["ours"]["all", "win_rate"].estimate.value)
