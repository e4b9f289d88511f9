"""Write the arithmetic example data: short English word problems with worked answers.

Run `python examples/make_arithmetic.py`. It writes two files of one-turn conversations next to this script:
`data/arithmetic.train.jsonl` (60) and `data/arithmetic.held-out.jsonl` (20). No problem occurs twice, not even with
other names, and the same SEED always gives the same bytes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

SEED = 20240
TRAIN_PER_TEMPLATE = 6
HELD_OUT_PER_TEMPLATE = 2
QUESTION_LENGTH = range(80, 151)
ANSWER_LENGTH = range(90, 151)
NAMES = ["Anna", "Ben", "Clara", "David", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Mina"]


class Template(NamedTuple):
    """A problem's text: a, b and c are drawn; compute(a, b, c) gives x, y and the result z."""

    words: list[str]
    a: range
    b: range
    c: range
    question: str
    steps: str
    compute: Callable[[int, int, int], tuple[int, int, int]]


TEMPLATES = [
    Template(["notebooks", "candles", "mugs", "puzzles"], range(3, 10), range(3, 10), range(4, 40),
        "{name} has {y} euros and buys {a} {word} at {b} euros each. How many euros does {name} have left?",
        "The {word} cost {a} * {b} = {x} euros together. The money left is {y} - {x} = {z} euros.",
        lambda a, b, c: (a * b, a * b + c, c)),
    Template(["apples", "pears", "lemons", "peaches"], range(4, 10), range(12, 31), range(15, 45),
        "A market stall receives {a} boxes with {b} {word} in each box and sells {c} {word}. How many {word} remain?",
        "The boxes hold {a} * {b} = {x} {word}. After selling {c} there remain {x} - {c} = {z} {word}.",
        lambda a, b, c: (a * b, 0, a * b - c)),
    Template(["novel", "comic", "travel book", "biography"], range(12, 36), range(4, 10), range(20, 91),
        "{name} reads {a} pages a day of a {word} with {y} pages. How many pages are left to read after {b} days?",
        "In {b} days {name} reads {a} * {b} = {x} pages. The pages left are {y} - {x} = {z}.",
        lambda a, b, c: (a * b, a * b + c, c)),
    Template(["bus", "truck", "taxi", "camper van"], range(45, 95, 5), range(2, 7), range(11, 50),
        "A {word} drives for {b} hours at {a} km per hour and then another {c} km. How many km does it drive in all?",
        "The first part is {a} * {b} = {x} km long. The whole way of the {word} is {x} + {c} = {z} km.",
        lambda a, b, c: (a * b, 0, a * b + c)),
    Template(["marbles", "beads", "balloons", "stickers"], range(3, 10), range(5, 16), range(5, 13),
        "{name} shares {c} red and {y} blue {word} equally among {a} friends. How many {word} does each friend get?",
        "Together there are {c} + {y} = {x} {word}. Each of the {a} friends gets {x} / {a} = {z} {word}.",
        lambda a, b, c: (a * b, a * b - c, b)),
    Template(["garden", "field", "playground", "meadow"], range(6, 31), range(3, 26), range(1),
        "A rectangular {word} is {y} m long and {a} m wide. How many metres of fence go once around the {word}?",
        "A long and a short side together measure {y} + {a} = {x} m. The fence needs 2 * {x} = {z} m.",
        lambda a, b, c: (a + b + a, a + b, 2 * (a + b + a))),
    Template(["sister", "brother", "cousin", "friend"], range(15, 41), range(3, 10), range(4, 21),
        "{name} is {a} years old and has a {word} who is {b} years younger. How old will the {word} be in {c} years?",
        "The {word} is now {a} - {b} = {x} years old. In {c} years the age will be {x} + {c} = {z}.",
        lambda a, b, c: (a - b, 0, a - b + c)),
    Template(["rice", "flour", "carrots", "lentils"], range(20, 125, 5), range(2, 7), range(7, 13),
        "A recipe for {b} people needs {y} grams of {word}. How many grams of {word} does {name} need for {c} people?",
        "One person needs {y} / {b} = {a} grams of {word}. For {c} people it is {a} * {c} = {z} grams.",
        lambda a, b, c: (a, a * b, a * c)),
    Template(["bicycle", "guitar", "tent", "camera"], range(6, 26), range(4, 13), range(15, 91),
        "{name} has {c} euros for a {word} and saves {a} euros more every week. How many euros is that after {b} weeks?",
        "In {b} weeks {name} saves {a} * {b} = {x} euros. With the first {c} euros it is {x} + {c} = {z}.",
        lambda a, b, c: (a * b, 0, a * b + c)),
    Template(["night train", "tourist train", "local train"], range(4, 10), range(40, 81), range(12, 96),
        "A {word} has {a} carriages with {b} seats each, and {y} passengers sit down. How many seats stay free?",
        "The {word} has {a} * {b} = {x} seats in all. The free seats are {x} - {y} = {z}.",
        lambda a, b, c: (a * b, a * b - c, c)),
]  # fmt: skip


def generate(rng: Random) -> list[tuple[str, str]]:
    """Question and answer pairs, the templates in turn; no template gets the same numbers twice."""
    pairs: list[tuple[str, str]] = []
    seen: set[tuple[str, int, int, int]] = set()
    while len(pairs) < (TRAIN_PER_TEMPLATE + HELD_OUT_PER_TEMPLATE) * len(TEMPLATES):
        t = TEMPLATES[len(pairs) % len(TEMPLATES)]
        a, b, c = rng.choice(t.a), rng.choice(t.b), rng.choice(t.c)
        x, y, z = t.compute(a, b, c)
        names = {"name": rng.choice(NAMES), "word": rng.choice(t.words)}
        numbers = {"a": a, "b": b, "c": c, "x": x, "y": y, "z": z}
        question = t.question.format(**names, **numbers)
        answer = f"{t.steps.format(**names, **numbers)} The answer is {z}."
        key = (t.question, a, b, c)
        if key not in seen and len(question) in QUESTION_LENGTH and len(answer) in ANSWER_LENGTH:
            seen.add(key)
            pairs.append((question, answer))
    return pairs


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in turns]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    data = Path(__file__).parent / "data"
    data.mkdir(exist_ok=True)
    pairs = generate(Random(SEED))
    train, held_out = pairs[: TRAIN_PER_TEMPLATE * len(TEMPLATES)], pairs[TRAIN_PER_TEMPLATE * len(TEMPLATES) :]
    assert len({q for q, _ in pairs}) == len({a for _, a in pairs}) == len(pairs), "a problem occurs twice"
    assert not {q for q, _ in train} & {q for q, _ in held_out}, "train and held-out overlap"
    write(data / "arithmetic.train.jsonl", train)
    write(data / "arithmetic.held-out.jsonl", held_out)
