"""generate/models/<author>/answers/: `answers-*.json`; generate/models/<model>/scores/<author>/: `scores-*.json`;
generate/chosen/: `conversations.jsonl`, the chosen answers, an ordinary data set, and `candidates.jsonl`, all of them.

One step for each author, and one for each model and author that it scores, so that a new source answers, scores and is scored, and
no more. A model that is listed twice answers and scores once.
"""

from collections import ChainMap, Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run import ranks
from fusechat.run.files import digest_json
from fusechat.run.manifests import which_device
from fusechat.run.shards import Shards
from fusechat.run.steps import Step

FORMAT = 1
# What a judge said; no step's, so that it is not asked again when the choice is made anew.
JUDGEMENTS = "judgements.jsonl"
_TALLIES = ("answers", "candidates", "tokens", "scored")  # counts summed over processes; `left_out` by its keys


@dataclass(frozen=True)
class Authors:
    """`answers`: the step of each author, a model that is listed twice once; `scores`: of each model and author; `scorer_of`: by
    which name an author scores, of those that can; `rewards`: what a reward model makes of each author's answers."""

    answers: dict[str, Step]
    scores: dict[tuple[str, str], Step]
    scorer_of: dict[str, str]
    rewards: dict[str, Step]

    @property
    def upstream(self) -> dict[str, Step]:
        return {step.name: step for each in (self.answers, self.scores, self.rewards) for step in each.values()}


def authors(recipe: Recipe, workdir: Path) -> Authors:
    answers: dict[str, Step] = {}
    seen: set[str] = set()
    for name in recipe.answering:
        step = answers_step(recipe, workdir, name)
        if (key := digest_json(step.settings)) not in seen:
            answers[name] = step
            seen.add(key)
    by_key: dict[str, str] = {}
    scorers = {name: by_key.setdefault(digest_json(_scoring(recipe, name)), name) for name in (PIVOT, *recipe.models)}
    scorer_of = {name: scorers[name] for name in answers if name in scorers}
    assert recipe.generate is not None
    everybody = list(dict.fromkeys(scorers.values())) if recipe.generate.scored_by_all else None
    scores = {
        (scorer, name): scores_step(recipe, workdir, scorer, name, step)
        for name, step in answers.items()
        for scorer in (everybody if everybody is not None else [scorer_of[name]] if name in scorer_of else [])
    }
    judged = recipe.reward_model() is not None
    rewards = {name: rewards_step(recipe, workdir, name, step) for name, step in answers.items() if judged}
    return Authors(answers, scores, scorer_of, rewards)


def answers_step(recipe: Recipe, workdir: Path, name: str) -> Step:
    """One model, or server, answers its prompts."""
    sets, how = recipe.read_sets(name), recipe.generate
    assert how is not None
    settings = {
        "prompts": [data.identity() for data in sets],
        "on_error": recipe.data.on_error,
        "join_turns": recipe.data.join_turns,
        "shard_prompts": recipe.capture.shard_conversations,
        **how.model_dump(include={"samples", "temperature", "top_p", "max_new_tokens"}),
        **({"seed": recipe.seed} if how.temperature else {}),
        **_answering(recipe, name),
    }

    def work(directory: Path) -> dict[str, Any]:
        from fusechat.generate.answer import answer

        return answer(directory, recipe, name, sets)

    directory = workdir / "generate" / "models" / name / "answers"
    return _step(f"{name}/answers", directory, settings, work)


def _answering(recipe: Recipe, name: str) -> dict[str, Any]:
    """Settings of who answers. Where a server is does not count."""
    source = recipe.sources.get(name)
    if source is not None and source.server is not None:
        return {"served": source.server.model, "stop": source.stop or []}
    chat_model, capture = recipe.chat_model(name), recipe.capture_for(name)
    return {
        "model": chat_model.tokenizer_identity,
        "stop": list(chat_model.stop),
        "device": recipe.device,
        "dtype": capture.dtype,
        "backend": capture.backend,
    }


def open_model(*asked: Any) -> Any:
    """See `backends.open_model`."""
    from fusechat.generate.backends import open_model

    return open_model(*asked)


def scores_step(recipe: Recipe, workdir: Path, scorer: str, author: str, answers: Step) -> Step:
    """One model scores the answers of one author."""

    def work(directory: Path) -> dict[str, Any]:
        from fusechat.generate.score import score

        return score(directory, recipe, scorer, author, Shards(answers.directory, "answers"))

    directory = workdir / "generate" / "models" / scorer / "scores" / author
    return _step(f"{scorer}/scores/{author}", directory, _scoring(recipe, scorer), work, {"answers": answers})


def _scoring(recipe: Recipe, name: str) -> dict[str, Any]:
    """Settings of who scores."""
    capture = recipe.capture_for(name)
    return {
        "model": recipe.chat_model(name).tokenizer_identity,
        "max_length": recipe.data.max_length,
        "device": recipe.device,
        "dtype": capture.dtype,
        "backend": capture.backend,
    }


def _step(
    name: str, directory: Path, settings: dict[str, Any], work: Any, upstream: Mapping[str, Step] | None = None
) -> Step:
    """A step that all processes share, shard by shard."""
    whole: dict[str, Any] = {"whole_files": True, "join": lambda counts: ranks.from_first(lambda: _join(counts))}
    return Step("generate", name, directory, settings, work, upstream or {}, FORMAT, _counted, **whole)


def _counted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **which_device(settings)}


def _join(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """One of the counts of all processes."""
    joined = dict(ChainMap(*counts))
    joined |= {key: sum(one.get(key, 0) for one in counts) for key in _TALLIES if key in joined}
    joined["left_out"] = dict(sum((Counter(one["left_out"]) for one in counts), Counter[str]()))
    return joined


def rewards_step(recipe: Recipe, workdir: Path, author: str, answers: Step) -> Step:
    """The reward model judges the answers of one author."""
    chat_model = recipe.reward_model()
    assert chat_model is not None
    settings = {"model": chat_model.tokenizer_identity, "dtype": recipe.capture.dtype, "device": recipe.device}

    def work(directory: Path) -> dict[str, Any]:
        from fusechat.generate.reward import reward

        return reward(directory, recipe, chat_model, author, Shards(answers.directory, "answers"))

    directory = workdir / "generate" / "rewards" / author
    return _step(f"rewards/{author}", directory, settings, work, {"answers": answers})


def chosen_step(recipe: Recipe, workdir: Path) -> Step:
    """Chooses one answer for each prompt."""
    how, found = recipe.generate, authors(recipe, workdir)
    assert how is not None
    settings = {
        "authors": list(found.answers),
        "scorer_of": found.scorer_of,
        "choose": _choosing(recipe),
        "keep": how.keep,
        **({"seed": recipe.seed} if how.choose.way == "random" else {}),
    }

    def work(directory: Path) -> dict[str, Any]:
        return _choose(directory, recipe, found)

    return Step("generate", "chosen", workdir / "generate" / "chosen", settings, work, found.upstream, FORMAT)


def _choosing(recipe: Recipe) -> Any:
    """How one is chosen, as far as it changes which: not where a server is, nor how long a verifier may take."""
    assert recipe.generate is not None
    choose = recipe.generate.choose
    if choose.verifier is not None:
        from fusechat.models.verify import code_of

        return {"verifier": choose.verifier, "code": code_of(choose.verifier)}
    return {"judge": choose.judge.model} if choose.judge else {"reward": True} if choose.reward else choose.model_dump()


def _choose(directory: Path, recipe: Recipe, found: Authors) -> dict[str, Any]:
    from fusechat.data.prompts import read_prompts
    from fusechat.generate.answered import gather
    from fusechat.generate.chosen import choose_all
    from fusechat.generate.judged import put_judgements

    how = recipe.generate
    assert how is not None
    sets = list(dict.fromkeys(data for name in found.answers for data in recipe.read_sets(name)))
    read = read_prompts(sets)
    read.tell(unused=how.choose.verifier is None)
    answers, rewards = (
        {name: step.directory for name, step in each.items()} for each in (found.answers, found.rewards)
    )
    scores = {pair: step.directory for pair, step in found.scores.items()}
    answered = gather(read.conversations, answers, scores, rewards)
    put_judgements(answered, sets, how.choose, journal=directory.parent / JUDGEMENTS)
    told: dict[str, Any] = {"data": read.data, "scorer_of": found.scorer_of, "seed": recipe.seed}
    return {**read.counts, **choose_all(answered, directory, how, **told)}
