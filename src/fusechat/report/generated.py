"""What the page tells of a recipe that generates: who answered, what was chosen, what was left out, what it took."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.data.conversations import DataSet
from fusechat.data.rejected import LeftOut
from fusechat.generate.backends import BEYOND_SERVERS
from fusechat.generate.chosen import CONVERSATIONS, read_candidates
from fusechat.generate.stage import Authors, authors, chosen_step
from fusechat.models.facts import DataFile
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.report.authors import ALL, Place, largest, places
from fusechat.report.examples import Example, examples, pick
from fusechat.run.steps import Step

_BY = {
    "likelihood": "the one that the models find most likely on average",
    "self": "the one that its own author finds most likely",
    "vote": "what most answers say",
    "random": "one drawn at random",
    "source": "that of {}",
    "verifier": "the one to which the verifier {} gives the highest value",
    "judge": "the one to which the judge {} gives the highest grade",
    "reward": "the one to which {} gives the highest reward",
}
NATS, _UNITS = "nats per byte", {"verifier": "verdict", "judge": "grade", "reward": "reward"}


@dataclass(frozen=True)
class AnswerCost:
    """What a model generated and scored in `seconds`; None where it does not, or nothing is recorded. `calls`: to a server."""

    name: str
    answers: int | None
    generated: int | None
    scored: int | None
    read: int | None
    calls: int | None
    seconds: float | None


@dataclass(frozen=True)
class Generated:
    """`counts`: of the manifest of the choice; `by`: which answer was chosen; `unit`: of scores; `by_author`: each answer is taught
    by its author. `places`: all prompts, then the sets of them that are shown, out of so many `sets`; `asked`: the files of
    prompts; `sha256`: of the chosen answers; `left_out`: answers that are no candidates, and what a model cannot score."""

    counts: Mapping[str, Any]
    by: str
    unit: str
    by_author: bool
    places: tuple[Place, ...]
    sets: int
    asked: tuple[DataFile, ...]
    sha256: str
    examples: tuple[Example, ...]
    left_out: tuple[LeftOut, ...]
    costs: tuple[AnswerCost, ...]

    @property
    def shares(self) -> str:
        """Whose answers are learnt, in a line."""
        total, by_name = self.counts["chosen"], self.counts["authors"]
        ranked = sorted(by_name.items(), key=lambda each: -each[1])
        return ", ".join(f"{name} {number:,} ({number / total:.0%})" for name, number in ranked)


def generated(recipe: Recipe, workdir: Path) -> Generated | None:
    """From the files of the finished steps; None for a recipe that does not generate."""
    if recipe.generate is None:
        return None
    how, step, found = recipe.generate.choose, chosen_step(recipe, workdir), authors(recipe, workdir)
    counts = _counts(step)

    def lines() -> Any:
        return read_candidates(step.directory, found.scorer_of)

    every = places(lines(), list(found.answers), how.way)
    what = how.source or how.verifier or (how.judge and how.judge.model) or (how.reward and str(how.reward.reference))
    return Generated(
        counts=counts,
        by=_BY[how.way].format(" ".join(what) if isinstance(what, list) else what),
        unit=_UNITS.get(how.way, NATS),
        by_author=recipe.fuse.function == "author",
        places=tuple(largest(every)),
        sets=max(1, len(every) - 1),
        asked=tuple(_asked(recipe, found, every)),
        sha256=f"sha256:{(step.manifest() or {})['outputs'][CONVERSATIONS]['sha256']}",
        examples=tuple(examples(lines(), pick(lines(), how, recipe.seed))),
        left_out=tuple(_all_left_out(found)),
        costs=tuple(_costs(recipe, found, counts)),
    )


def _counts(step: Step) -> dict[str, Any]:
    return dict((step.manifest() or {}).get("counts", {}))


def _asked(recipe: Recipe, found: Authors, every: Sequence[Place]) -> Iterator[DataFile]:
    """The files of prompts, each with how many it holds."""
    who: dict[DataSet, list[str]] = {}
    identities: dict[DataSet, str] = {}
    for name, step in found.answers.items():
        settings = (step.manifest() or {})["inputs"]["settings"]
        for data, identity in zip(recipe.read_sets(name), settings["prompts"], strict=True):
            who.setdefault(data, []).append(name)
            identities[data] = identity.removesuffix(" prompts=True")
    prompts = {place.data: place.prompts for place in every[len(who) > 1 :]}
    for data, names in who.items():
        number = prompts.get(data.name if len(who) > 1 else ALL)
        counts = {"conversations": number, "responses": None, "response_tokens": None}
        yield DataFile(data.name, Path(data.path).name, identities[data], f"answered by {', '.join(names)}", counts)


def _left_out(name: str, what: str, step: Step, kept: str) -> Iterator[LeftOut]:
    """What a finished step could do nothing with, by why; nothing where there is none."""
    counts = _counts(step)
    if reasons := counts.get("left_out"):
        ranked = dict(sorted(reasons.items(), key=lambda each: -each[1]))
        yield LeftOut(name, what, counts[kept], ranked, step.directory)


def _all_left_out(found: Authors) -> Iterator[LeftOut]:
    for name, step in found.answers.items():
        yield from _left_out(name, "answers", step, "candidates")
    for (name, author), step in found.scores.items():
        yield from _left_out(name, f"scores of {author}", step, "scored")
    for author, step in found.rewards.items():
        yield from _left_out("reward model", f"rewards of {author}", step, "scored")


def _costs(recipe: Recipe, found: Authors, chosen: Mapping[str, Any]) -> Iterator[AnswerCost]:
    """A row for each model, those that answer first."""
    served = {name for name in found.answers if name not in (PIVOT, *recipe.models)}
    for name in dict.fromkeys([*found.answers, *(scorer for scorer, _ in found.scores)]):
        answers = found.answers.get(name)
        counts = _counts(answers) if answers else {}
        scores = [step for (scorer, _), step in found.scores.items() if scorer == name]
        calls = counts["answers"] - counts["left_out"].get(BEYOND_SERVERS, 0) if name in served else None
        steps = [*([answers] if answers else []), *scores]
        yield AnswerCost(
            name, counts.get("answers"), counts.get("tokens") or None, *_scored(scores), calls, _seconds(steps)
        )
    if found.rewards:
        steps = list(found.rewards.values())
        yield AnswerCost("reward model", None, None, *_scored(steps), None, _seconds(steps))
    if recipe.generate is not None and (judge := recipe.generate.choose.judge):
        yield AnswerCost(f"judge {judge.model}", None, None, None, None, chosen["candidates"], None)


def _scored(steps: Sequence[Step]) -> tuple[int | None, int | None]:
    """How many answers, and tokens of answers; None for what is not recorded."""
    counts = [_counts(step) for step in steps]
    totals = (sum(one.get(key, 0) for one in counts) for key in ("scored", "tokens"))
    answers, tokens = (total or None for total in totals)
    return answers, tokens


def _seconds(steps: Sequence[Step]) -> float:
    return sum((step.manifest() or {"timings": {"seconds": 0.0}})["timings"]["seconds"] for step in steps)
