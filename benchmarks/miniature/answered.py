"""What the choice among the sources' answers was worth: how many are right, and what it took."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniature.jobs import Base, Place
from miniature.settings import Changes, sources

BY_ALL = {"likelihood", "vote", "verifier"}  # ways for which every model scores every answer


@dataclass(frozen=True)
class Worth:
    """`right`: the share of all prompts whose chosen answer is right, `chosen`: of which one was chosen at all; tokens that the
    sources wrote, and how many answers models scored, each model counted."""

    right: float
    chosen: float
    written: int
    scored: int


def worth(changes: Changes, place: Place, seed: int = 0) -> Worth:
    base = Base(changes, seed)
    gold = dict(map(_asked_and_answered, _lines(base.train(place))))
    work = base.directory(place) / "generate"
    chosen = [_asked_and_answered(line) for line in _lines(work / "chosen" / "conversations.jsonl")]
    right = sum(gold[asked] == answer for asked, answer in chosen)
    only = _choose(changes).get("source")
    answered = [_counts(work / "models" / name / "answers") for name in ([only] if only else sources(changes))]
    written = sum(one["tokens"] for one in answered)
    return Worth(right / len(gold), len(chosen) / len(gold), written, sum(_scored(changes, work)))


def _scored(changes: Changes, work: Path) -> Iterator[int]:
    """Answers that the choice needs to be scored, of each model and author: a directory may have more."""
    choose, samples = _choose(changes), changes["generate"].get("samples", 1)
    by_all = choose.keys() & BY_ALL or ("source" in choose and samples > 1)
    for directory in work.glob("models/*/scores/*"):
        scorer, author = directory.parts[-3], directory.parts[-1]
        if author in ([choose["source"]] if "source" in choose else sources(changes)) and (by_all or scorer == author):
            yield _counts(directory)["scored"]


def _choose(changes: Changes) -> dict[str, Any]:
    choose = changes["generate"].get("choose", "likelihood")
    return {choose: True} if isinstance(choose, str) else choose


def _counts(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["counts"])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _asked_and_answered(record: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    *asked, answer = (turn["content"] for turn in record["messages"])
    return tuple(asked), answer
