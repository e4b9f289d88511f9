"""Evaluation texts in the training data: found as a naive comparison of all with all finds them, and told before training."""

import json
import math
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import runs
from fusechat.commands.run import run
from fusechat.data.conversations import Conversation, DataSet, Message, Questions
from fusechat.errors import DataError
from fusechat.evaluate import questions
from fusechat.pipeline import build_steps, load_recipe, select_steps
from fusechat.prepare.overlap import KINDS, NEAR_PROMPT, NEAR_RESPONSE, SAME, SAME_PROMPT, SAME_RESPONSE, find_overlap

Turns = list[tuple[str, str]]  # role, text


def texts(name: str, several: list[Turns]) -> Questions:
    """Conversations by hand, as a set that is read from nowhere."""
    made = [
        Conversation(tuple(Message(role, text) for role, text in turns), f"{name}:{number}")
        for number, turns in enumerate(several, 1)
    ]
    return Questions(name, name, lambda _: made)


def found(training: list[Turns], evaluation: list[Turns]) -> list[tuple[str, str, str, float, int]]:
    hits = find_overlap([texts("train", training)], [texts("eval", evaluation)]).hits
    return [(one.evaluation, one.training, one.kind, one.similarity, one.times) for one in hits]


def talk(*several: str) -> Turns:
    return [("assistant" if number % 2 else "user", text) for number, text in enumerate(several)]


# -- against a naive comparison of all with all ------------------------------------------------------------------------------


def naive_words(text: str) -> list[str]:
    """Of texts in Latin letters and ideographs."""
    words: list[str] = []
    for letters in re.split(r"[^a-z0-9\u4e00-\u9fff]+", plain(text)):
        for part in re.split(r"([\u4e00-\u9fff])", letters):
            words += [part] if part else []
    return words


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def naive_near(own: str, other: str) -> float:
    """The share of runs of three words that the other text has; 0 for a text of fewer than eight words, or a share below 0.8."""
    ours, theirs = naive_words(own), naive_words(other)
    if len(ours) < 8 or len(theirs) < 8:
        return 0.0
    runs_ = {tuple(ours[at : at + 3]) for at in range(len(ours) - 2)}
    there = sum(any(theirs[at : at + 3] == list(one) for at in range(len(theirs) - 2)) for one in runs_)
    return there / len(runs_) if 10 * there >= 8 * len(runs_) else 0.0


def naive_kinds(training: Turns, evaluation: Turns) -> dict[str, float]:
    def parts(turns: Turns) -> tuple[list[str], list[str], Turns]:
        told = [(role, plain(text)) for role, text in turns if role != "system"]
        return [text for role, text in told if role == "user"][:1], [t for role, t in told if role == "assistant"], told

    ours, theirs = parts(evaluation), parts(training)
    if ours[2] and ours[2] == theirs[2]:
        return {SAME: 1.0}
    kinds: dict[str, float] = {}
    for side, same, near in ((0, SAME_PROMPT, NEAR_PROMPT), (1, SAME_RESPONSE, NEAR_RESPONSE)):
        pairs: list[Any] = [(one, other) for one in ours[side] for other in theirs[side]]
        long_enough = 8 if side else 1
        if any(one == other and one and (len(naive_words(one)) >= long_enough or not side) for one, other in pairs):
            kinds[same] = 1.0
            continue
        nearest = max((naive_near(one, other) for one, other in pairs), default=0.0)
        if nearest:
            kinds[near] = nearest
    return kinds


def naive(training: list[Turns], evaluation: list[Turns]) -> list[tuple[str, str, str, float, int]]:
    hits = []
    for number, ours in enumerate(evaluation, 1):
        alike: dict[str, list[tuple[float, int]]] = {}
        for place, theirs in enumerate(training, 1):
            for kind, similarity in naive_kinds(theirs, ours).items():
                alike.setdefault(kind, []).append((-similarity, place))
        for kind in KINDS:
            if kind in alike:
                similarity, place = min(alike[kind])
                hits.append((f"eval:{number}", f"train:{place}", kind, round(-similarity, 4), len(alike[kind])))
    return hits


WORDS = st.sampled_from(["a", "B", "b", "c", "ﬁ", "fi", "你", "好", "d.", "(d)", "9"])
TEXT = st.lists(WORDS, max_size=14).map(" ".join) | st.sampled_from(["", " ", "…", "a b c a b c a b c a b d"])
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "assistant"]), TEXT), max_size=4)


@given(st.lists(TURNS, max_size=6), st.lists(TURNS, max_size=6), st.data())
def test_what_is_found_is_what_a_naive_comparison_finds(
    training: list[Turns], evaluation: list[Turns], data: st.DataObject
) -> None:
    """Some evaluation texts are training texts, with a word changed or not."""
    for turns in data.draw(st.lists(st.sampled_from(training), max_size=3)) if training else []:
        at = data.draw(st.integers(0, 20))
        evaluation = [*evaluation, [(role, text if at > 14 else changed(text, at)) for role, text in turns]]
    assert found(training, evaluation) == naive(training, evaluation)


def changed(text: str, at: int) -> str:
    words = text.split(" ")
    return " ".join([*words[:at], "x", *words[at + 1 :]])


# -- by hand ------------------------------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve"  # ten runs of three words


@pytest.mark.parametrize(
    ("training", "evaluation", "expected"),
    [
        (talk("q", "r"), talk("q", "r"), (SAME, 1.0)),
        ([("system", "Be short."), *talk("q", "r")], talk("Q ", "\tr"), (SAME, 1.0)),
        (talk("Was ist das?", "ja"), talk("was  IST\ndas?", "nein"), (SAME_PROMPT, 1.0)),
        (talk("STRASSE", "a"), talk("straße", "b"), (SAME_PROMPT, 1.0)),
        (talk("ｗｈａｔ ²", "a"), talk("what 2", "b"), (SAME_PROMPT, 1.0)),
        (talk("what?", "a"), talk("what", "b"), None),
        (talk("q", "Yes."), talk("p", "yes."), None),
        (talk("q", LONG), talk("p", LONG.upper()), (SAME_RESPONSE, 1.0)),
        (talk("q", "a", "p", LONG), talk("x", "y", "z", LONG), (SAME_RESPONSE, 1.0)),
        (talk("a", "b", "q", "r"), talk("q", "s"), None),
        (talk("q", "r"), talk("q", "s", "q2", "r"), (SAME_PROMPT, 1.0)),
        (talk(f"{LONG}.", "a"), talk(f"({LONG}!)", "b"), (NEAR_PROMPT, 1.0)),
        (talk(f"Answer this: {LONG} - and be short", "a"), talk(LONG, "b"), (NEAR_PROMPT, 1.0)),
        (talk(LONG, "a"), talk(f"{LONG} but much longer, so that most of it is not there", "b"), None),
        (talk("q", LONG), talk("p", LONG.replace("eleven twelve", "x y")), (NEAR_RESPONSE, 0.8)),
        (talk("q", LONG), talk("p", LONG.replace("ten eleven twelve", "x y z")), None),
        (talk("q", LONG), talk(LONG, "p"), None),
        (talk("今天天气怎么样呢朋友", "a"), talk("今天天气怎么样呢朋友?", "b"), (NEAR_PROMPT, 1.0)),
        (talk("q", "今天天气很好我们出去走走"), talk("p", "今天天气很好我们出去走吧"), (NEAR_RESPONSE, 0.9)),
        (talk("one two three four five six seven.", "a"), talk("one two three four five six seven", "b"), None),
        (
            talk("one two three four five six seven 8.", "a"),
            talk("one two three four five six seven 8", "b"),
            (NEAR_PROMPT, 1.0),
        ),
        ([], [], None),
        (talk("", ""), talk("", ""), (SAME, 1.0)),
        (talk("", "a"), talk("", "b"), None),
        ([("assistant", LONG)], [("user", LONG)], None),
    ],
)
def test_by_hand(training: Turns, evaluation: Turns, expected: tuple[str, float] | None) -> None:
    hits = [] if expected is None else [("eval:1", "train:1", *expected, 1)]
    assert found([training], [evaluation]) == hits
    assert naive([training], [evaluation]) == hits or "STRASSE" in str(training)


def test_the_most_alike_is_named_and_all_are_counted() -> None:
    near = LONG.replace("twelve", "x")
    training = [
        talk(near, "a"),
        talk(LONG, "b"),
        talk("z", "z"),
        talk(LONG, "c"),
        talk(f"{LONG}!", "d"),
        talk(LONG, "e"),
    ]
    assert found(training, [talk("z", "y"), talk(LONG, "e")]) == [
        ("eval:1", "train:3", SAME_PROMPT, 1.0, 1),
        ("eval:2", "train:6", SAME, 1.0, 1),
        ("eval:2", "train:2", SAME_PROMPT, 1.0, 2),
        ("eval:2", "train:5", NEAR_PROMPT, 1.0, 2),
    ]


def test_a_conversation_counts_once_by_what_says_most() -> None:
    first, second = (
        texts("first", [talk("q", LONG), talk(LONG, "r")]),
        texts("second", [talk(LONG, "r"), talk("q", "s")]),
    )
    evaluation = [talk("q", LONG), talk(LONG, "other"), talk("p", LONG), talk("free", "of it")]
    data: list[Any] = [first, second]
    result = find_overlap(data, [texts("held out", evaluation), texts("clean", [talk("x", "y")])])
    assert result.pairs() == [
        {
            "evaluation": "held out",
            "training": "first",
            "conversations": 4,
            "found": {SAME: 1, SAME_PROMPT: 1, SAME_RESPONSE: 1},
        },
        {"evaluation": "held out", "training": "second", "conversations": 4, "found": {SAME_PROMPT: 2}},
        {"evaluation": "clean", "training": "first", "conversations": 1, "found": {}},
        {"evaluation": "clean", "training": "second", "conversations": 1, "found": {}},
    ]
    assert result.sentences() == [
        "3 of 4 conversations of held out are in the training data (1 same conversation, 1 same prompt, 1 same response)"
    ]


def test_a_near_duplicate_has_the_share_of_runs_exactly() -> None:
    """Of any length: so many runs as make four fifths, and not one fewer."""
    for words in range(8, 60):
        text = " ".join(f"w{number}" for number in range(words))
        needed = math.ceil((words - 2) * 4 / 5 - 1e-9)
        for kept in (needed, needed - 1):
            other = " ".join(f"w{number}" for number in range(kept + 2)) + " and then something else of some length"
            assert [hit[2] for hit in found([talk(other, "a")], [talk(text, "b")])] == [NEAR_PROMPT] * (kept == needed)


# -- files --------------------------------------------------------------------------------------------------------------------


def test_files_are_read_and_places_told_and_what_is_malformed_is_passed_over(tmp_path: Path) -> None:
    path = runs.write_conversations(tmp_path / "train.jsonl", 3)
    path.write_text("not JSON\n\n" + path.read_text())
    held_out = runs.write_conversations(tmp_path / "held-out.jsonl", 2, first=2)
    seen: list[None] = []
    result = find_overlap([DataSet("data", str(path))], [DataSet("held-out", str(held_out))], lambda: seen.append(None))
    assert [(hit.evaluation, hit.training, hit.kind) for hit in result.hits] == [(f"{held_out}:1", f"{path}:5", SAME)]
    assert (result.sizes, len(seen)) == ({"held-out": 2}, 3)


def test_the_questions_of_suites_are_those_that_the_suites_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AlpacaEval's are where the hub's client would look for them."""
    from fusechat.evaluate.alpaca.data import BASELINE, HUB
    from fusechat.evaluate.mt_bench.data import load, questions_at_hand

    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "AlpacaEval" not in [one.name for one in questions.find_installed()]
    repository = tmp_path / "hub" / f"datasets--{HUB.replace('/', '--')}"
    file = repository / "snapshots" / "0123" / BASELINE
    file.parent.mkdir(parents=True)
    file.write_text(
        json.dumps([{"instruction": f"ask {n}", "output": "x", "generator": "g", "dataset": ""} for n in range(3)])
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    one = next(one for one in questions.find_installed() if one.name == "AlpacaEval")
    assert [[message.content for message in each.messages] for each in one.read()] == [["ask 0"], ["ask 1"], ["ask 2"]]
    asked = "import sys, huggingface_hub as h; print(h.try_to_load_from_cache(sys.argv[1], sys.argv[2], repo_type='dataset'))"
    theirs = subprocess.run([sys.executable, "-c", asked, HUB, BASELINE], capture_output=True, text=True, check=True)
    assert one.path == str(file) == theirs.stdout.strip()
    if questions_at_hand() is None:
        pytest.skip("MT-Bench's questions are not installed")
    bench = next(one for one in questions.find_installed() if one.name == "MT-Bench")
    turns = [tuple(message.content for message in each.messages) for each in bench.read()]
    assert turns == [question.turns for question in load(None).questions]


# -- the pipeline -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(models: dict[str, Path], tmp_path: Path) -> Path:
    """A recipe whose held-out conversations 7 to 11 are in part those of its training set, 0 to 9."""
    path = runs.write_recipe(tmp_path, models)
    runs.write_conversations(tmp_path / "held-out.jsonl", 5, first=7)
    return path


def test_it_is_told_before_any_capture(recipe: Path, heard: list[str]) -> None:
    work = recipe.parent / "work"
    steps = build_steps(load_recipe(recipe), work)
    assert steps[0].label == "prepare overlap"
    run(load_recipe(recipe), work, until="prepare")
    hits = [json.loads(line) for line in (work / "prepare" / "overlap" / "overlap.jsonl").read_text().splitlines()]
    assert {hit["kind"] for hit in hits} == {SAME}
    assert [Path(hit["evaluation"]).name for hit in hits] == [
        "held-out.jsonl:1",
        "held-out.jsonl:2",
        "held-out.jsonl:3",
    ]
    assert [Path(hit["training"]).name for hit in hits] == ["train.jsonl:8", "train.jsonl:9", "train.jsonl:10"]
    told = "3 of 5 conversations of data-held-out are in the training data (3 same conversation)"
    line = f"prepare overlap: {told}: see {work / 'prepare' / 'overlap' / 'overlap.jsonl'}"
    assert [one for one in heard if one.startswith("prepare overlap")] == [line]
    pairs = json.loads((work / "prepare" / "overlap" / "manifest.json").read_text())["counts"]["pairs"]
    named = {(pair["evaluation"], pair["training"]): sum(pair["found"].values()) for pair in pairs}
    expected = {("data-held-out", "data"): 3, ("data-held-out", "gemma"): 0}
    expected |= {("gemma-held-out", "data"): 0, ("gemma-held-out", "gemma"): 0}
    assert {key: count for key, count in named.items() if key[0].endswith("held-out")} == expected
    heard.clear()
    run(load_recipe(recipe), work, until="prepare")
    assert not [one for one in heard if one.startswith("prepare overlap")]


def test_it_stops_where_the_recipe_says_so(recipe: Path) -> None:
    work = recipe.parent / "work"
    with pytest.raises(
        DataError, match=r"^3 of 5 conversations of data-held-out .*; data\.on_overlap: warn continues$"
    ):
        run(load_recipe(recipe, ["data.on_overlap=stop"]), work, until="capture")
    assert not (work / "capture").exists()
    assert len((work / "prepare" / "overlap" / "overlap.jsonl").read_text().splitlines()) == 3


def test_nothing_that_is_trained_rests_on_it(recipe: Path) -> None:
    """Other held-out conversations change what is measured and told, not what is trained; a source's own job looks too."""
    before = {step.label: step.fingerprint for step in build_steps(load_recipe(recipe), recipe.parent / "work")}
    runs.write_conversations(recipe.parent / "held-out.jsonl", 6, first=50)
    steps = build_steps(load_recipe(recipe), recipe.parent / "work")
    redone = {step.label for step in steps if step.fingerprint != before[step.label]}
    assert {"prepare overlap", "report"} <= redone
    assert not {label for label in redone if label.split()[0] in ("capture", "align", "fuse", "merge")}
    assert select_steps(steps, only="gemma")[0].label == "prepare overlap"


def test_a_run_that_measures_nothing_has_nothing_to_look_for(recipe: Path) -> None:
    none = load_recipe(recipe, ["evaluate.bits_per_byte=false"])
    assert "prepare overlap" not in {step.label for step in build_steps(none, recipe.parent / "work")}
