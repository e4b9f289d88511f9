"""One answer chosen among the candidates of a prompt, and the prompts of whose answer one can be surest."""

import math
import random
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

JUDGED = ("verifier", "judge", "reward")


@dataclass(frozen=True)
class Candidate:
    """A distinct answer to a prompt. `samples`: how many of the answers of each of its authors it is, in the recipe's order.
    `scores`: nats per byte by each model that was to score it, None where one cannot; `own`: of each author that can score, its
    own; `judged`: what a verifier, a judge or a reward model makes of it, more being better, None where it says nothing."""

    text: str
    samples: Mapping[str, int]
    scores: Mapping[str, float | None]
    own: Mapping[str, float]
    judged: float | None = None

    @property
    def author(self) -> str:
        """Of several, the one that finds it most likely; of equal ones the first."""
        return min(self.samples, key=lambda name: self.own.get(name, math.inf))


@dataclass(frozen=True)
class Choice:
    """`index` among the candidates. `score`: by which it was chosen, None where there is none. `sureness`: its merit less that of
    the second, its merit alone if there is no other. The merit is the score, or of nats per byte the likelihood, `exp(-nats)`."""

    index: int
    author: str
    score: float | None
    sureness: float


def likelihoods(candidates: Sequence[Candidate]) -> list[float]:
    """For each the mean nats per byte over the models that scored all of them, infinite where no model did."""
    common = [
        model
        for model in dict.fromkeys(name for one in candidates for name in one.scores)
        if all(one.scores.get(model) is not None for one in candidates)
    ]
    if not common:
        return [math.inf] * len(candidates)
    return [sum(one.scores[model] or 0.0 for model in common) / len(common) for one in candidates]


def choose(
    candidates: Sequence[Candidate], way: str, *, source: str | None = None, seed: int = 0, prompt: str = ""
) -> Choice | None:
    """The best of a prompt's candidates, which stand in the recipe's order of their first authors. Ties go to the more likely one,
    then to the first. None where none can be chosen: of a `source` that gave none, or where a verifier accepts none.

    `way`: `likelihood`, the lowest mean; `self`, the lowest of an author's own; `vote`, the text (trimmed, in Unicode's NFC) that
    most answers have; `random`, any answer, by `seed` and the `prompt`'s key; `source`, the answer of that source, of several
    the most likely; `verifier`, `judge`, `reward`, the best judged.
    """
    means = likelihoods(candidates)
    values = _values(candidates, means, way, source=source, seed=seed, prompt=prompt)
    able = [place for place, value in enumerate(values) if value is not None]
    if not able:
        return None
    best = min(able, key=lambda place: (-_known(values[place]), means[place], place))
    by_nats = way in ("likelihood", "self", "source")
    merits = {place: math.exp(_known(values[place])) if by_nats else _known(values[place]) for place in able}
    second = max((merits[place] for place in able if place in _others(candidates, best, way)), default=0.0)
    value = _known(values[best])
    score = None if way == "random" or not math.isfinite(value) else -value if by_nats else value
    return Choice(best, candidates[best].author if source is None else source, score, merits[best] - second)


def _known(value: float | None) -> float:
    return -math.inf if value is None else value


def _values(
    candidates: Sequence[Candidate], means: Sequence[float], way: str, *, source: str | None, seed: int, prompt: str
) -> list[float | None]:
    """By which candidates are compared, more being better; None for one that may not be chosen."""
    if way == "likelihood":
        return [-mean for mean in means]
    if way == "self":
        return [-min(one.own.values(), default=math.inf) for one in candidates]
    if way == "vote":
        votes = Counter[str]()
        for one in candidates:
            votes[plain(one.text)] += sum(one.samples.values())
        return [float(votes[plain(one.text)]) for one in candidates]
    if way == "random":
        answers = [place for place, one in enumerate(candidates) for _ in range(sum(one.samples.values()))]
        drawn = random.Random(f"{seed} {prompt}").choice(answers)
        return [0.0 if place == drawn else None for place in range(len(candidates))]
    if way == "source":
        return [
            -(mean if math.isfinite(mean) else one.own.get(source or "", math.inf)) if source in one.samples else None
            for one, mean in zip(candidates, means, strict=True)
        ]
    judged = [one.judged for one in candidates]
    return [value if way != "verifier" or _known(value) > 0 else None for value in judged]


def _others(candidates: Sequence[Candidate], best: int, way: str) -> set[int]:
    """What the best is compared with to tell how sure it is: of votes, other texts."""
    same = plain(candidates[best].text)
    return {
        place for place, one in enumerate(candidates) if place != best and (way != "vote" or plain(one.text) != same)
    }


def plain(text: str) -> str:
    """What texts are equal by."""
    return unicodedata.normalize("NFC", text.strip())


def surest(choices: Sequence[Choice], share: float) -> list[int]:
    """Places of the share of `choices`, one at least, that are surest, in their order. Of equal ones the first."""
    number = max(1, math.ceil(round(share * len(choices), 9)))
    ranked = sorted(range(len(choices)), key=lambda place: -choices[place].sureness)
    return sorted(ranked[:number])


def agreement(prompts: Sequence[Sequence[Candidate]]) -> float | None:
    """Of the prompts that several models answered, the share to which all answers are the same text; None where there is none."""
    several = [one for one in prompts if len({author for candidate in one for author in candidate.samples}) > 1]
    if not several:
        return None
    return sum(len({plain(candidate.text) for candidate in one}) == 1 for one in several) / len(several)
