"""Splits that no content crosses, and conversations drawn from them."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from miniature.skills import SKILLS, Dialogue

SPLITS = {
    "school": 62,
    "train": 18,
    "validation": 5,
    "test": 15,
}  # per cent; every dialogue is in one, by a hash of what it asks


def split_of(content: str) -> str:
    """The split that all dialogues belong to that ask this."""
    place = int(hashlib.sha256(content.encode()).hexdigest()[:8], 16) % 100
    for name, share in SPLITS.items():
        place -= share
        if place < 0:
            return name
    raise AssertionError("the shares add up to 100")


def draw(split: str, weights: Mapping[str, float], seed: object) -> Iterator[tuple[str, Dialogue]]:
    """Skills and dialogues of a split without end, skills drawn by weight; the same for the same seed."""
    rng = random.Random(f"{split} {seed}")
    names = list(weights)
    while True:
        skill = rng.choices(names, [weights[name] for name in names])[0]
        content, dialogue = SKILLS[skill](rng)
        while split_of(content) != split:
            content, dialogue = SKILLS[skill](rng)
        yield skill, dialogue


def distinct(split: str, skill: str, count: int, seed: object = 0) -> list[Dialogue]:
    """`count` different dialogues of a skill; fewer where the split soon has no more."""
    found: dict[Dialogue, None] = {}
    stream = draw(split, {skill: 1.0}, seed)
    for _ in range(50 * count):
        found[next(stream)[1]] = None
        if len(found) == count:
            break
    return list(found)


def messages(dialogue: Dialogue) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(dialogue)]


def write(path: Path, dialogues: list[Dialogue]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": messages(dialogue)}) for dialogue in dialogues]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def lesson(seed: int, *, a_skill: int, wrong: float, rare: float) -> list[Dialogue]:
    """Training conversations: `a_skill` of each skill, of `RARE` ones the share `rare` of that; the share `wrong` has the last
    answer of another question of the same skill."""
    rng = random.Random(f"lesson {seed}")
    found: list[Dialogue] = []
    for skill in SKILLS:
        count = max(1, round(a_skill * (rare if skill in RARE else 1.0)))
        dialogues = distinct("train", skill, count, seed)
        answers = [dialogue[-1] for dialogue in dialogues]
        for dialogue in dialogues:
            spoilt = rng.random() < wrong
            found.append((*dialogue[:-1], rng.choice(answers)) if spoilt else dialogue)
    return found


RARE = ("arithmetic", "sorting", "editing", "follow-up")
