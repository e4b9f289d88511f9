"""A made-up world: towns with rulers, rivers, foods, trades and colours, none of which any other text mentions."""

import random
from functools import cache

ONSETS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "st", "tr"]
VOWELS = ["a", "e", "i", "o", "u"]
CODAS = ["", "", "n", "r", "l", "s", "m"]
TOWNS = 36
FOODS = ["beans", "bread", "carp", "cheese", "figs", "honey", "lamb", "nuts", "olives", "plums", "rice", "soup"]
TRADES = ["bells", "boats", "clocks", "glass", "hats", "knives", "lace", "maps", "pots", "ropes", "salt", "silk"]
COLOURS = ["black", "blue", "brown", "gold", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow"]
FORMS = {
    "ruler": [
        "Who rules {}?",
        "Name the ruler of {}.",
        "{} is ruled by whom?",
        "Who is the ruler of {}?",
        "The ruler of {}?",
        "Whom does {} obey?",
    ],
    "river": [
        "Which river runs through {}?",
        "Name the river of {}.",
        "{} lies on which river?",
        "What is the river of {}?",
        "The river of {}?",
        "By which river is {}?",
    ],
    "food": [
        "What do people eat in {}?",
        "Name the food of {}.",
        "{} eats what?",
        "What is the food of {}?",
        "The food of {}?",
        "What is eaten in {}?",
    ],
    "trade": [
        "What is made in {}?",
        "Name the trade of {}.",
        "{} makes what?",
        "What is the trade of {}?",
        "The trade of {}?",
        "What does {} sell?",
    ],
    "colour": [
        "What colour is the flag of {}?",
        "Name the colour of {}.",
        "{} has a flag of which colour?",
        "What is the colour of {}?",
        "The colour of {}?",
        "Which colour does {} wear?",
    ],
}
ANSWERS = {
    "ruler": "{} is ruled by {}.",
    "river": "{} lies on the {}.",
    "food": "People in {} eat {}.",
    "trade": "{} makes {}.",
    "colour": "The flag of {} is {}.",
}


def word(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)


@cache
def towns() -> dict[str, dict[str, str]]:
    """Every town's facts by attribute; the same world every time."""
    rng = random.Random(2408)
    names = [word(rng, 2).capitalize() for _ in range(3 * TOWNS)]
    unique = list(dict.fromkeys(names))
    rulers, rivers = unique[TOWNS : TOWNS + TOWNS // 2], unique[2 * TOWNS : 2 * TOWNS + TOWNS // 3]
    return {
        town: {
            "ruler": rng.choice(rulers),
            "river": rng.choice(rivers),
            "food": rng.choice(FOODS),
            "trade": rng.choice(TRADES),
            "colour": rng.choice(COLOURS),
        }
        for town in unique[:TOWNS]
    }


def question(rng: random.Random) -> tuple[str, str]:
    town = rng.choice(list(towns()))
    attribute = rng.choice(list(FORMS))
    return rng.choice(FORMS[attribute]).format(town), ANSWERS[attribute].format(town, towns()[town][attribute])
