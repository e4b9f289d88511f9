"""Prompts with all that was answered to them and what models make of it, from the files of the steps before."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fusechat.data.conversations import Conversation
from fusechat.generate.choose import Candidate
from fusechat.run.shards import Row, Shards

Directories = Mapping[tuple[str, str], Path]  # of what a model makes of the answers of an author


@dataclass
class Answered:
    """A prompt with its answers, by text, in the recipe's order of their authors. `scores` and `judged` by text, too; `why`: of
    each author, why other answers are no candidates."""

    prompt: Conversation
    samples: dict[str, dict[str, int]] = field(default_factory=dict)  # text → author → how many of its answers
    scores: dict[str, dict[str, float | None]] = field(default_factory=lambda: defaultdict(dict))  # … → nats per byte
    judged: dict[str, float | None] = field(default_factory=dict)
    why: dict[str, list[str]] = field(default_factory=dict)

    def candidates(self, scorer_of: Mapping[str, str]) -> list[Candidate]:
        """`scorer_of`: by which name an author scores, of those that can."""
        found = []
        for text, samples in self.samples.items():
            scores = dict(self.scores.get(text, {}))
            own = {author: scores.get(scorer_of.get(author, "")) for author in samples}
            known = {name: nats for name, nats in own.items() if nats is not None}
            found.append(Candidate(text, samples, scores, known, self.judged.get(text)))
        return found


def gather(
    prompts: Iterable[Conversation], answers: Mapping[str, Path], scores: Directories, rewards: Mapping[str, Path]
) -> list[Answered]:
    """`answers`: the directory of each author's answers, in the recipe's order; `rewards`: of what a reward model makes of them. Of
    a text that several authors gave, what models make of the first one's counts."""
    found = {one.id: Answered(one) for one in prompts}
    text_of: dict[tuple[str, str, int], str] = {}
    for author, directory in answers.items():
        for row in _rows(directory, "answers"):
            one = found[row["id"]]
            if row["why"]:
                one.why.setdefault(author, []).append(row["why"])
                continue
            text_of[author, row["id"], row["sample"]] = row["text"]
            authors = one.samples.setdefault(row["text"], {})
            authors[author] = authors.get(author, 0) + 1
    for (model, author), directory in scores.items():
        for row in _rows(directory, "scores"):
            text = text_of[author, row["id"], row["sample"]]
            nats = None if row["nll"] is None else row["nll"] / row["bytes"]
            found[row["id"]].scores[text].setdefault(model, nats)
    for author, directory in rewards.items():
        for row in _rows(directory, "rewards"):
            found[row["id"]].judged.setdefault(text_of[author, row["id"], row["sample"]], row["reward"])
    return list(found.values())


def _rows(directory: Path, kind: str) -> Iterator[Row]:
    return (row for rows in Shards(directory, kind) for row in rows)
