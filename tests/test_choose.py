"""Choosing among answers, against values that were worked out by hand."""

import math

import pytest

from fusechat.generate.choose import Candidate, Choice, agreement, choose, likelihoods, surest


def candidate(
    text: str, authors: str | dict[str, int] = "a", scores: dict[str, float | None] | None = None, **more: float
) -> Candidate:
    """`authors`: letters, one answer each. A model of an author's name is the author."""
    samples = dict.fromkeys(authors, 1) if isinstance(authors, str) else authors
    scores = scores or {}
    own = {name: nats for name in samples if (nats := scores.get(name)) is not None}
    return Candidate(text, samples, scores, own, **more)


def chosen(candidates: list[Candidate], way: str, **how: object) -> tuple[str, str, float | None]:
    found = choose(candidates, way, **how)  # type: ignore[arg-type]
    assert found is not None
    return candidates[found.index].text, found.author, found.score


TWO = [
    candidate("x", "a", {"a": 0.1, "b": 0.9, "p": 0.8}),  # mean 0.6
    candidate("y", "b", {"a": 0.6, "b": 0.2, "p": 0.4}),  # mean 0.4
]


def test_likelihood_is_the_lowest_mean_of_all_models() -> None:
    assert likelihoods(TWO) == pytest.approx([0.6, 0.4])
    assert chosen(TWO, "likelihood") == ("y", "b", pytest.approx(0.4))


def test_a_model_that_cannot_score_one_candidate_counts_for_none_of_them() -> None:
    """With b's 0.9 and 0.2 gone: means of a and p, 0.45 and 0.5."""
    without = [
        candidate("x", "a", {"a": 0.1, "b": 0.9, "p": 0.8}),
        candidate("y", "b", {"a": 0.6, "b": 0.2, "p": 0.4}),
        candidate("z", "c", {"a": 2.0, "b": None, "p": 2.0}),
    ]
    assert likelihoods(without) == pytest.approx([0.45, 0.5, 2.0])
    assert chosen(without, "likelihood") == ("x", "a", pytest.approx(0.45))


def test_where_no_model_scores_all_the_first_is_taken_without_a_score() -> None:
    none = [candidate("x", "a", {"a": None, "b": 0.1}), candidate("y", "b", {"a": 0.1, "b": None})]
    assert likelihoods(none) == [math.inf, math.inf]
    found = choose(none, "likelihood")
    assert found == Choice(0, "a", None, 0.0)


def test_equal_scores_go_to_the_first() -> None:
    ties = [candidate("x", "a", {"a": 0.25, "b": 0.75}), candidate("y", "b", {"a": 0.75, "b": 0.25})]
    assert chosen(ties, "likelihood")[:2] == ("x", "a")
    assert chosen(ties[::-1], "likelihood")[:2] == ("y", "b")


def test_of_several_authors_of_one_text_the_one_that_finds_it_most_likely_is_its_author() -> None:
    same = candidate("x", "abc", {"a": 0.5, "b": 0.2, "c": 0.3, "p": 0.1})
    assert choose([same], "likelihood") == Choice(0, "b", pytest.approx(0.275), pytest.approx(math.exp(-0.275)))
    assert candidate("x", "sc", {"c": 3.0}).author == "c", "a server, which cannot score, only where nobody can"
    assert candidate("x", "st").author == "s"


def test_self_is_each_authors_own() -> None:
    """x by a 0.1; y by b 0.2 and c 0.05, so that y wins, by c."""
    three = [*TWO[:1], candidate("y", "bc", {"a": 0.6, "b": 0.2, "c": 0.05})]
    assert chosen(three, "self") == ("y", "c", 0.05)
    assert chosen(TWO, "self") == ("x", "a", 0.1)


def test_votes_are_of_texts_trimmed_and_composed_and_ties_go_to_the_likelier() -> None:
    composed, decomposed = "M\u00fcnchen", "Mu\u0308nchen"
    several = [
        candidate("Bonn", "a", {"p": 0.1}),
        candidate(composed, "b", {"p": 0.9}),
        candidate(f" {decomposed}", "c", {"p": 0.5}),
    ]
    assert chosen(several, "vote") == (f" {decomposed}", "c", 2.0)
    assert chosen(several[:2], "vote") == ("Bonn", "a", 1.0)
    samples = [candidate("Bonn", {"a": 1}, {"p": 0.1}), candidate("Berlin", {"a": 3}, {"p": 0.9})]
    assert chosen(samples, "vote") == ("Berlin", "a", 3.0)


def test_random_takes_each_answer_as_often_and_one_prompt_always_the_same() -> None:
    """Text x has three of four answers."""
    four = [candidate("x", {"a": 2, "b": 1}, {"a": 0.5, "b": 0.1}), candidate("y", {"b": 1}, {"b": 0.1})]
    drawn = [chosen(four, "random", seed=0, prompt=str(number)) for number in range(2000)]
    assert drawn.count(("x", "b", None)) == pytest.approx(1500, abs=80), "5 standard deviations are 97"
    assert drawn.count(("y", "b", None)) == 2000 - drawn.count(("x", "b", None))
    assert drawn == [chosen(four, "random", seed=0, prompt=str(number)) for number in range(2000)]
    assert drawn != [chosen(four, "random", seed=1, prompt=str(number)) for number in range(2000)]


def test_a_named_source() -> None:
    assert chosen(TWO, "source", source="a") == ("x", "a", pytest.approx(0.6))
    shared = [candidate("x", "ab", {"a": 0.9, "b": 0.1})]
    assert chosen(shared, "source", source="a")[1] == "a", "who is asked for is the author"
    assert choose(TWO, "source", source="c") is None
    samples = [*TWO, candidate("z", "a", {"a": 0.3, "b": 0.3, "p": 0.3})]
    assert chosen(samples, "source", source="a") == ("z", "a", pytest.approx(0.3))


@pytest.mark.parametrize("way", ["verifier", "judge", "reward"])
def test_the_best_judged_and_of_equal_ones_the_likelier(way: str) -> None:
    scores = [{"p": 0.5}, {"p": 0.1}, {"p": 0.2}]
    three = [candidate(text, text, one, judged=1.0) for text, one in zip("abc", scores, strict=True)]
    assert chosen(three, way) == ("b", "b", 1.0)
    assert chosen([*three, candidate("d", "d", {"p": 9.0}, judged=2.0)], way) == ("d", "d", 2.0)
    assert chosen([candidate("e", "e"), three[0]], way) == ("a", "a", 1.0), "nothing is said of e"
    assert choose([candidate("e", "e")], way) is None
    nothing = choose([candidate("x", "a", judged=0.0), candidate("y", "b", judged=-1.0)], way)
    assert (nothing is None) == (way == "verifier"), "only a verifier says that an answer is wrong"


def test_how_sure_a_choice_is() -> None:
    """The margin of likelihoods per byte; of a lone candidate its own; of votes that to the next text."""
    best = choose(TWO, "likelihood")
    assert best is not None
    assert best.sureness == pytest.approx(math.exp(-0.4) - math.exp(-0.6))
    lone = choose(TWO[:1], "likelihood")
    assert lone is not None
    assert lone.sureness == pytest.approx(math.exp(-0.6))
    votes = [candidate("x", "abc"), candidate(" x", "d"), candidate("y", "e")]
    sure = choose(votes, "vote")
    assert sure is not None
    assert sure.sureness == 4 - 1


def test_the_surest_are_kept_in_their_order() -> None:
    choices = [Choice(0, "a", None, sureness) for sureness in (0.1, 0.9, 0.5, 0.5)]
    assert surest(choices, 1.0) == [0, 1, 2, 3]
    assert surest(choices, 0.5) == [1, 2]
    assert surest(choices, 0.51) == [1, 2, 3]
    assert surest(choices, 0.01) == [1]
    assert surest([Choice(0, "a", None, 0.0)] * 10, 0.3) == [0, 1, 2], (
        "0.3 · 10 is 3, whatever floating point makes of it"
    )


def test_agreement_is_of_prompts_that_several_models_answered() -> None:
    assert agreement([[candidate("x", "ab")], [candidate("x", "a"), candidate("y", "b")], [candidate("x", "a")]]) == 0.5
    assert agreement([[candidate("x", "a"), candidate("x ", "b")]]) == 1.0
    assert agreement([[candidate("x", "a")], []]) is None
