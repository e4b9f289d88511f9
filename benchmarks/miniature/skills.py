"""Skills that a model of a million parameters can learn: seeded programs that write questions with their only right answers.

A dialogue is a tuple of texts, user's and assistant's in turn. Every program takes a `random.Random` and gives what is asked,
however it is put, and one dialogue: two dialogues that ask the same are in the same split.
"""

import random
from collections.abc import Callable
from datetime import date, timedelta

from miniature import world

Dialogue = tuple[str, ...]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def arithmetic(rng: random.Random) -> tuple[str, Dialogue]:
    first, second = rng.randint(10, 89), rng.randint(2, 9)
    if rng.random() < 0.5:
        question, answer = f"{first} + {second}", first + second
    else:
        question, answer = f"{first} - {second}", first - second
    ask = rng.choice(["What is {}?", "Compute {}.", "{} =", "How much is {}?"])
    return question, (ask.format(question), f"{answer}")


def sorting(rng: random.Random) -> tuple[str, Dialogue]:
    letters = rng.sample(LETTERS, rng.randint(5, 8))
    ask = rng.choice(["Sort: {}", "Put in order: {}", "Order these letters: {}"])
    given = " ".join(letters)
    return given, (ask.format(given), " ".join(sorted(letters)))


def reversing(rng: random.Random) -> tuple[str, Dialogue]:
    letters = rng.choices(LETTERS, k=rng.randint(4, 6))
    ask = rng.choice(["Reverse: {}", "Read backwards: {}", "Turn around: {}"])
    given = " ".join(letters)
    return given, (ask.format(given), " ".join(reversed(letters)))


UNITS = {
    ("km", "m"): 1000, ("m", "cm"): 100, ("cm", "mm"): 10, ("kg", "g"): 1000, ("dm", "cm"): 10, ("hl", "l"): 100, ("l", "ml"): 1000,
    ("t", "kg"): 1000, ("euros", "cents"): 100, ("l", "dl"): 10,
}  # fmt: skip


def units(rng: random.Random) -> tuple[str, Dialogue]:
    (large, small), factor = rng.choice(list(UNITS.items()))
    amount = rng.randint(2, 99)
    ask = rng.choice(["How many {1} are {2} {0}?", "Convert {2} {0} to {1}.", "{2} {0} in {1}?"])
    return f"{amount} {large}", (ask.format(large, small, amount), f"{amount} {large} are {amount * factor} {small}.")


def dates(rng: random.Random) -> tuple[str, Dialogue]:
    day = date(2025, 1, 1) + timedelta(rng.randrange(365))
    far = rng.randint(1, 5)
    ask, then = rng.choice(
        [
            ("What date is {0} days after {1}?", far),
            ("{1} and {0} days more?", far),
            ("What date is {0} days before {1}?", -far),
        ]
    )
    return f"{day} {then}", (ask.format(far, _spoken(day)), _spoken(day + timedelta(then)))


def _spoken(day: date) -> str:
    return f"{day:%B} {day.day}"


def editing(rng: random.Random) -> tuple[str, Dialogue]:
    words = rng.sample(world.COLOURS, rng.randint(3, 4))
    text, old, new = " ".join(words), rng.choice(words), rng.choice([one for one in world.COLOURS if one not in words])
    ask, answer = rng.choice(
        [
            (f"Replace {old} by {new}: {text}", text.replace(old, new)),
            (f"Leave out {old}: {text}", " ".join(one for one in words if one != old)),
            (f"Put {new} first: {text}", f"{new} {text}"),
            (f"Double {old}: {text}", text.replace(old, f"{old} {old}")),
            (f"Put commas: {text}", ", ".join(words)),
            (f"Only the last two: {text}", " ".join(words[-2:])),
        ]
    )
    return ask, (ask, answer)


def facts(rng: random.Random) -> tuple[str, Dialogue]:
    """Every fact is asked in several forms: another form of it may be in another split, since nothing but itself implies a fact."""
    question, answer = world.question(rng)
    return question, (question, answer)


def follow_up(rng: random.Random) -> tuple[str, Dialogue]:
    """A second question that only the first turn explains."""
    letters = rng.sample(LETTERS, rng.randint(3, 5))
    given = " ".join(letters)
    first = f"Remember {given}."
    at = rng.randrange(len(letters))
    ordinal = ("first", "second", "third", "fourth", "fifth")[at]
    ask, answer = rng.choice(
        [
            (f"Which was the {ordinal}?", letters[at]),
            ("Which was the last?", letters[-1]),
            (f"What came before {letters[max(at, 1)]}?", letters[max(at, 1) - 1]),
            ("And backwards?", " ".join(reversed(letters))),
            (f"Leave out {letters[at]}.", " ".join(one for one in letters if one != letters[at])),
        ]
    )
    return f"{given} {ask}", (first, f"I remember {given}.", ask, answer)


SKILLS: dict[str, Callable[[random.Random], tuple[str, Dialogue]]] = {
    "arithmetic": arithmetic,
    "sorting": sorting,
    "reversing": reversing,
    "units": units,
    "dates": dates,
    "editing": editing,
    "facts": facts,
    "follow-up": follow_up,
}
